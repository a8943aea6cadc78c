"""The objective of one micro-batch: student forward, teacher's targets, the fused loss; exact under any split.

A step's loss is a weighted mean over its supervised targets (or over its sequences). The denominators are taken over
the whole step, all ranks and micro-batches, before the first forward; every micro-batch then adds its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from limbeck.distill.config import LossConfig
from limbeck.distill.ensemble import weighted_fused_loss
from limbeck.distill.fused import FusedLoss
from limbeck.distill.selection import SupervisedRows, divergences, keep_top, teacher_entropies
from limbeck.distill.vocabulary import VocabularyPart, head_rows, part_of, with_heads
from limbeck.ledger import (
    Ledger,
    backbone_backward_flops,
    backbone_forward_flops,
    head_flops,
    head_forward_flops,
)
from limbeck.models.anatomy import Computed, Head, Sizes, head_of, hidden_rows
from limbeck.models.sharded import is_sharded, whole_head
from limbeck.teacher.targets import DenseTargets, SeveralTargets, TeacherTargets
from limbeck.traces.batch import Batch, Example
from limbeck.traces.supervise import TokenSelection


class Teacher(Protocol):
    """Gives targets at the supervised positions of a batch."""

    @property
    def in_step(self) -> bool:
        """Whether all processes must ask together, because each holds a part of it."""
        ...

    def targets(self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger) -> TeacherTargets:
        """Targets for the tokens at flat indices `rows` of the batch, in that order; charges its cost to the ledger."""
        ...


class Totals(NamedTuple):
    """Denominators of a step."""

    ce: float
    """Sum of CE weights (token_mean), or number of sequences with any (sequence_mean)."""
    kd: float
    """The same of KD weights."""


def step_totals(examples: Sequence[Example], normalization: str) -> Totals:
    """Denominators over all examples of a step, whichever rank or micro-batch they fall to."""
    sums = np.array([[e.ce_weight.sum(dtype=np.float64), e.kd_weight.sum(dtype=np.float64)] for e in examples])
    sums = sums.reshape(-1, 2)
    if normalization == "sequence_mean":
        sums = (sums > 0).astype(np.float64)
    ce, kd = sums.sum(axis=0)
    return Totals(float(ce), float(kd))


def coefficients(
    batch: Batch, rows: Tensor, totals: Totals, kd_ratio: float, normalization: str
) -> tuple[Tensor, Tensor]:
    """What every row adds to the step's loss: float32 [N] for CE and for KD.

    A term without any weight in the step has a coefficient of 0, so empty supervision gives 0, never NaN.
    """
    weights = [batch.ce_weight.flatten(), batch.kd_weight.flatten()]
    if normalization == "sequence_mean":
        weights = [_per_sequence(batch, weight) for weight in weights]
    ce_scale = (1 - kd_ratio) / totals.ce if totals.ce else 0.0
    kd_scale = kd_ratio / totals.kd if totals.kd else 0.0
    return weights[0][rows] * ce_scale, weights[1][rows] * kd_scale


def microbatch_loss(
    student: Any,
    student_sizes: Sizes,
    teacher: Teacher | None,
    batch: Batch,
    examples: Sequence[Example],
    totals: Totals,
    config: LossConfig,
    kd_ratio: float,
    ledger: Ledger,
    vocab_size: int | None = None,
    select: TokenSelection | None = None,
    shard_head: bool = False,
) -> FusedLoss | None:
    """Forward pass of a micro-batch and its share of the step's loss; None when nothing in it is supervised.

    A student in parts is run by all processes together, so there the pass is made for every micro-batch, even without
    examples (`traces.batch.idle`), which then costs a token that is not charged.

    Args:
      student: the model, packed or padded as the batch is.
      batch: on the student's device; `examples` are the same ones, in order.
      totals: the step's denominators.
      vocab_size: the tokenizer's real vocabulary; head rows beyond it are padding.
      select: which of the KD positions are kept; rows that it leaves without any term skip the student's head and,
        where the teacher alone decides, its forward pass.
      shard_head: multiply by this process's part of the vocabulary alone, where the student is in parts.
    """
    rows = batch.target_rows()
    ce_coef, kd_coef = coefficients(batch, rows, totals, kd_ratio, config.normalization)
    if torch.is_grad_enabled() and examples:
        ledger.count(tokens=batch.num_tokens, sequences=len(batch.sequence_lengths))
    used = (ce_coef != 0) | (kd_coef != 0)
    rows, ce_coef, kd_coef = rows[used], ce_coef[used], kd_coef[used]
    head, runs_together = head_of(student), is_sharded(student)
    vocab = vocab_size or len(head.weight)
    part = part_of(head.weight, vocab) if shard_head else None
    targets = _ask(teacher, batch, examples, rows, kd_coef, ledger, part)
    if len(rows) == 0 and not runs_together:
        return None
    supervised = SupervisedRows(rows, ce_coef, kd_coef, targets)
    if select is not None and len(rows) and select.by == "teacher_entropy":
        supervised = _select_by_entropy(select, supervised, batch, vocab, ledger)
    with ledger.phase("student"):
        packed = batch.sequence_lengths if batch.layout == "packed" else None
        hidden, computed = hidden_rows(student, batch.input_ids, batch.positions, supervised.rows - 1, packed)
    with ledger.phase("head"):
        head = whole_head(head) if part is None else head_rows(head, part)
    if select is not None and len(rows) and select.by == "divergence":
        scored = len(hidden)
        supervised, hidden = _select_by_divergence(select, supervised, batch, hidden, head, config, vocab, ledger)
        if torch.is_grad_enabled() and targets is not None:
            passes = len(targets.parts) if isinstance(targets, SeveralTargets) else 1
            ledger.add_flops(head=passes * head_forward_flops(student_sizes, scored))
    rows, ce_coef, kd_coef, targets = supervised
    with ledger.phase("head"):
        loss = weighted_fused_loss(
            hidden,
            head.weight,
            batch.input_ids.flatten()[rows],
            head_bias=head.bias,
            ce_coef=ce_coef,
            kd_coef=kd_coef,
            targets=targets,
            divergence=config.divergence,
            temperature=config.temperature,
            vocab_size=vocab_size,
            chunk_bytes=config.chunk_bytes,
            part=part,
        )
    if examples:
        _charge(ledger, student_sizes, batch, computed, len(rows))
    return loss


def _ask(
    teacher: Teacher | None,
    batch: Batch,
    examples: Sequence[Example],
    rows: Tensor,
    kd_coef: Tensor,
    ledger: Ledger,
    part: VocabularyPart | None,
) -> TeacherTargets:
    """The teacher's targets at `rows` where any has a KD term, with the head rows that the loss multiplies.

    Where the vocabulary is shared out, the rows of all processes meet in the loss, and one without a KD term has
    targets of the same form for no rows.
    """
    has_kd = bool((kd_coef != 0).any())
    if teacher is None or not (has_kd or part is not None or teacher.in_step):
        return None
    targets = with_heads(teacher.targets(batch, examples, rows if has_kd else rows[:0], ledger), part)
    return targets if has_kd or part is not None else None


def _select_by_entropy(
    select: TokenSelection, supervised: SupervisedRows, batch: Batch, vocab: int, ledger: Ledger
) -> SupervisedRows:
    if supervised.targets is None:
        return supervised
    with ledger.phase("teacher"):
        scores = teacher_entropies(supervised.targets, vocab)
        return _keep(select, supervised, batch, scores, vocab, ledger)[0]


def _select_by_divergence(
    select: TokenSelection,
    supervised: SupervisedRows,
    batch: Batch,
    hidden: Tensor,
    head: Head,
    config: LossConfig,
    vocab: int,
    ledger: Ledger,
) -> tuple[SupervisedRows, Tensor]:
    if supervised.targets is None:
        return supervised, hidden
    with ledger.phase("head"):
        scores = divergences(
            hidden, head.weight, head.bias, supervised.targets, config.divergence, config.temperature, vocab
        )
        kept, used = _keep(select, supervised, batch, scores, vocab, ledger)
        return kept, hidden[used]


def _keep(
    select: TokenSelection, supervised: SupervisedRows, batch: Batch, scores: Tensor, vocab: int, ledger: Ledger
) -> tuple[SupervisedRows, Tensor]:
    """The positions left and which they are; the loss takes the kept ones through the teacher's head a second time."""
    kd_coef = keep_top(scores, _owner(batch)[supervised.rows], supervised.kd_coef, select.fraction)
    kept, used = supervised._replace(kd_coef=kd_coef).used()
    for part in kept.targets.parts if isinstance(kept.targets, SeveralTargets) else (kept.targets,):
        if isinstance(part, DenseTargets):
            rows_of_head, width = part.head_weight.shape
            ledger.add_flops(teacher=2 * len(kept.rows) * min(vocab, rows_of_head) * width)
    return kept, used


def _laid_out(batch: Batch) -> list[int]:
    """Tokens of each sequence in the batch's tensors: padding included when padded."""
    if batch.layout == "packed":
        return list(batch.sequence_lengths)
    rows, width = batch.input_ids.shape
    return [width] * rows


def _charge(ledger: Ledger, sizes: Sizes, batch: Batch, computed: Computed, num_rows: int) -> None:
    flops = backbone_forward_flops(sizes, computed)
    head = head_flops(sizes, num_rows)
    if torch.is_grad_enabled():
        flops += backbone_backward_flops(sizes, computed)
        ledger.count(padded_tokens=sum(_laid_out(batch)) - batch.num_tokens, supervised_tokens=num_rows)
        ledger.add_flops(student=flops, head=head)


def _owner(batch: Batch) -> Tensor:
    """int64 [B T]: the sequence of every place in the flattened batch."""
    lengths = torch.tensor(_laid_out(batch), device=batch.input_ids.device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def _per_sequence(batch: Batch, weight: Tensor) -> Tensor:
    """Weights divided by their sum within each sequence."""
    owner = _owner(batch)
    sums = weight.new_zeros(len(batch.sequence_lengths)).index_add_(0, owner, weight)
    return weight / sums.clamp_min(torch.finfo(weight.dtype).tiny)[owner]
