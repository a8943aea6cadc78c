"""The objective of distillation: student forward, teacher's targets, the fused loss; exact under any split."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.distill.borders import spare_borders
from limbeck.distill.fused import FusedLoss, fused_loss
from limbeck.distill.microbatch import MicroBatch, laid_out_tokens
from limbeck.distill.rows import SupervisedRows
from limbeck.distill.selection import select_by_student, select_without_student
from limbeck.ledger import head_flops
from limbeck.models.anatomy import head_of
from limbeck.models.sharded import is_sharded, whole_head
from limbeck.models.sharded_softmax import ShardedSoftmax, head_rows, part_of
from limbeck.teacher.targets import TeacherTargets


@dataclass(frozen=True, slots=True)
class Distillation:
    """(1 - kd_ratio) CE + kd_ratio T^2 D of a micro-batch, over the positions that are supervised and selected.

    A student in parts is run by all processes together, so there the pass is made for every micro-batch, even without
    examples (`traces.batch.idle`), which then costs a token that is not charged. Rows that the selection leaves without
    any term skip the student's head and, where the student is not asked which, its forward pass.
    """

    shard_head: bool = False
    """Multiply by this process's part of the vocabulary alone, where the student is in parts."""

    def __call__(self, given: MicroBatch) -> FusedLoss | None:
        """Forward pass of a micro-batch and its share of the step's loss; None when nothing in it is supervised."""
        (model, _, sizes, vocab, _), config = given.student, given.loss.config
        given.count_tokens()
        head, supervised, terms = head_of(model), given.used(), given.terms
        part = part_of(head.weight, vocab) if self.shard_head else None
        supervised = supervised._replace(targets=_ask(given, supervised, part))
        if len(supervised.rows) == 0 and not is_sharded(model):
            return None
        if given.loss.select is not None or given.loss.borders is not None or part is not None:
            terms = None  # what is left, or what other processes have, has to be asked for
        supervised = select_without_student(given, spare_borders(given, supervised))
        hidden, computed = given.hidden_states(supervised.rows)
        losses = []
        with given.ledger.phase("head"):
            head = whole_head(head) if part is None else head_rows(head, part)
            supervised, hidden = select_by_student(given, supervised, hidden, head)
            for ce_coef, kd_coef, targets in supervised.by_teacher():
                loss = fused_loss(
                    hidden,
                    head.weight,
                    given.labels(supervised.rows),
                    head_bias=head.bias,
                    head_softcap=head.softcap,
                    ce_coef=ce_coef,
                    kd_coef=kd_coef,
                    targets=targets,
                    divergence=config.divergence,
                    temperature=config.temperature,
                    vocab_size=vocab,
                    chunk_bytes=config.chunk_bytes,
                    part=part,
                    terms=terms,
                )
                losses.append(loss)
                terms = terms and terms._replace(ce=False)
        num_rows, padding = len(supervised.rows), sum(laid_out_tokens(given.batch)) - given.batch.num_tokens
        given.charge(computed, head=head_flops(sizes, num_rows), padded_tokens=padding, supervised_tokens=num_rows)
        return FusedLoss.sum(losses)


def _ask(given: MicroBatch, supervised: SupervisedRows, part: ShardedSoftmax | None) -> TeacherTargets | None:
    """The teacher's targets where any position has a KD term, with the head rows that the loss multiplies.

    Where the vocabulary is shared out, the rows of all processes meet in the loss, and one without a KD term has
    targets of the same form for no rows.
    """
    has_kd = bool((supervised.kd_coef != 0).any()) if given.terms is None else given.terms.kd
    if given.teacher is None or not (has_kd or part is not None or given.teacher.in_step):
        return None
    asked = given.ask(supervised.rows if has_kd else supervised.rows[:0])
    if not has_kd and part is None:
        return None
    return asked.map_heads(whole_head if part is None else lambda head: head_rows(head, part))
