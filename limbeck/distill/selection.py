"""Token selection: KD on the positions of each sequence that matter most, the rest skipped before the student's head.

With n_i KD positions in sequence i and the fraction x, the k_i = max(1, floor(x n_i)) positions of highest score are
kept, and their coefficients grow by one factor so that they carry the whole KD weight of their sequence. Two things
follow: the denominators of a step are those without selection, known before any forward pass; and what is kept depends
on the sequence alone, not on the micro-batch, the rank or the layout it falls to. Of equal scores the first is kept.

Sources: SE-KD (arXiv 2602.01395), teacher entropy; TIP (arXiv 2604.14084), student-teacher divergence. Differs: the
share is taken within each sequence and not over a batch, which no split of the batch would leave unchanged.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from limbeck.distill.config import LossConfig
from limbeck.distill.microbatch import MicroBatch
from limbeck.distill.rows import SupervisedRows
from limbeck.ledger import head_forward_flops
from limbeck.models.anatomy import Head
from limbeck.models.logits import ChunkedLogits
from limbeck.models.sharded_softmax import WHOLE
from limbeck.teacher.targets import Distance, OneTeacherTargets, TeacherTargets, weighted_sum
from limbeck.traces.truncate import share_of

CHUNK_ROWS = 256
"""Most positions whose logits exist at a time."""


def select_by_entropy(given: MicroBatch, supervised: SupervisedRows) -> SupervisedRows:
    """The positions left where the step selects by the teacher's entropy; else all of them."""
    select, targets = given.loss.select, supervised.targets
    if select is None or select.by != "teacher_entropy" or targets is None:
        return supervised
    with given.ledger.phase("teacher"):
        return _keep(given, supervised, targets.entropy(given.student.vocab_size), select.fraction)[0]


def select_by_divergence(
    given: MicroBatch, supervised: SupervisedRows, hidden: Tensor, head: Head
) -> tuple[SupervisedRows, Tensor]:
    """The positions left, and their hidden states, where the step selects by divergence; else all of them."""
    select, targets, student = given.loss.select, supervised.targets, given.student
    if select is None or select.by != "divergence" or targets is None:
        return supervised, hidden
    scores = divergences(hidden, head, targets, given.loss.config, student.vocab_size)
    if torch.is_grad_enabled():
        flops = head_forward_flops(student.sizes, len(hidden))
        given.ledger.add_flops(head=len(targets.by_teacher()) * flops)
    kept, used = _keep(given, supervised, scores, select.fraction)
    return kept, hidden[used]


def _keep(
    given: MicroBatch, supervised: SupervisedRows, scores: Tensor, fraction: float
) -> tuple[SupervisedRows, Tensor]:
    """The positions left and which they are; the loss takes the kept ones through the teacher's head a second time."""
    kd_coef = keep_top(scores, given.owner()[supervised.rows], supervised.kd_coef, fraction)
    kept, used = supervised._replace(kd_coef=kd_coef).used()
    assert kept.targets is not None
    given.ledger.add_flops(teacher=kept.targets.head_flops(given.student.vocab_size))
    return kept, used


def keep_top(scores: Tensor, owner: Tensor, coef: Tensor, fraction: float) -> Tensor:
    """Coefficients with all but the best share of each sequence set to 0, its sum over the sequence unchanged.

    Args:
      scores: float [N].
      owner: int64 [N], the sequence of each position.
      coef: float [N]; positions with 0 take no part.
      fraction: x in (0, 1].
    Returns: float [N].
    """
    place = torch.nonzero(coef != 0)[:, 0]
    of, score = owner[place].cpu().numpy(), scores[place].double().cpu().numpy()
    order = np.lexsort((np.arange(len(place)), -score, of))
    _, first, counts = np.unique(of[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, counts)
    limits = np.repeat([share_of(int(n), fraction) for n in counts], counts)
    kept = torch.zeros_like(coef)
    chosen = place[torch.from_numpy(order[rank < limits]).to(place.device)]
    kept[chosen] = coef[chosen]
    size = int(owner.max()) + 1 if len(owner) else 0
    whole, rest = (coef.new_zeros(size).index_add_(0, owner, x) for x in (coef, kept))
    return kept * (whole / rest.clamp_min(torch.finfo(rest.dtype).tiny))[owner]


@torch.no_grad()
def divergences(hidden: Tensor, head: Head, targets: TeacherTargets, config: LossConfig, vocab: int) -> Tensor:
    """D(teacher, student) [N], as the loss takes it, from a first pass through the student's head without gradients.

    Of several teachers it is sum_i w_i D(p_i, student), with a pass for each.
    """
    distance = Distance(config.divergence.bind(), config.temperature, WHOLE)
    with torch.autocast(hidden.device.type, enabled=False):
        return weighted_sum(
            (weight, _divergences(hidden, head, part, distance, vocab)) for part, weight in targets.by_teacher()
        )


def _divergences(hidden: Tensor, head: Head, targets: OneTeacherTargets, distance: Distance, vocab: int) -> Tensor:
    ones = torch.ones(len(hidden), device=hidden.device)
    student, teacher = ChunkedLogits(hidden, head, vocab), targets.reader(ones, vocab, distance)
    student.allocate(min(CHUNK_ROWS, len(hidden)))
    teacher.allocate(min(CHUNK_ROWS, len(hidden)))
    values = []
    for index in torch.arange(len(hidden), device=hidden.device).split(CHUNK_ROWS):
        states = student.states(index)
        teacher.read(index, states)
        logits = student.finish(student.logits(states), torch.float32)
        values.append(teacher.row_loss(slice(None), logits, None, ones[index, None]))
    return torch.cat(values)
