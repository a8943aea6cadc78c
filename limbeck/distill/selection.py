"""Token selection: KD on the positions of each sequence that matter most, the rest skipped before the student's head.

With n_i KD positions in sequence i and the fraction x, the k_i = max(1, floor(x n_i)) positions of highest score are
kept, and their coefficients grow by one factor so that they carry the whole KD weight of their sequence. Two things
follow: the denominators of a step are those without selection, known before any forward pass; and what is kept depends
on the sequence alone, not on the micro-batch, the rank or the layout it falls to. Of equal scores the first is kept.

Sources: SE-KD (arXiv 2602.01395), teacher entropy; TIP (arXiv 2604.14084), student-teacher divergence. Differs: the
share is taken within each sequence and not over a batch, which no split of the batch would leave unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.distill.divergence import LOG_FLOOR, DivergenceConfig
from limbeck.distill.head import Head
from limbeck.distill.rowloss import row_loss
from limbeck.distill.rows import make_rows
from limbeck.teacher.targets import DenseTargets, SeveralTargets, TeacherTargets, TopKTargets
from limbeck.traces.truncate import share_of

CHUNK_ROWS = 256
"""Most positions whose logits exist at a time."""


class SupervisedRows(NamedTuple):
    """The supervised positions of a micro-batch, all of length N."""

    rows: Tensor
    """int64, flat indices of the targets in the batch."""
    ce_coef: Tensor
    """float."""
    kd_coef: Tensor
    """float."""
    targets: TeacherTargets

    def used(self) -> tuple[SupervisedRows, Tensor]:
        """The positions that still have a term, and which they are: bool [N]."""
        keep = (self.ce_coef != 0) | (self.kd_coef != 0)
        return SupervisedRows(self.rows[keep], self.ce_coef[keep], self.kd_coef[keep], take(self.targets, keep)), keep


def take(targets: TeacherTargets, keep: Tensor) -> TeacherTargets:
    """The targets of some positions, by index or by mask."""
    if isinstance(targets, SeveralTargets):
        return SeveralTargets(tuple(_take(part, keep) for part in targets.parts), targets.weights)
    return None if targets is None else _take(targets, keep)


def _take(targets: DenseTargets | TopKTargets, keep: Tensor) -> DenseTargets | TopKTargets:
    if isinstance(targets, DenseTargets):
        return DenseTargets(targets.hidden[keep], targets.head_weight, targets.head_bias)
    return TopKTargets(targets.ids[keep], targets.log_probs[keep], targets.log_tail[keep])


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
def teacher_entropies(targets: TeacherTargets, vocab: int) -> Tensor:
    """Entropy in nats [N] of the teacher at temperature 1; over the K + 1 events of top-k targets.

    Of several teachers it is sum_i w_i H(p_i).
    """
    if isinstance(targets, SeveralTargets):
        return _weighted_sum(targets, [teacher_entropies(part, vocab) for part in targets.parts])
    if isinstance(targets, TopKTargets):
        return _entropy(torch.cat([targets.log_probs, targets.log_tail[:, None]], 1))
    assert targets is not None
    with torch.autocast(targets.hidden.device.type, enabled=False):
        head = Head(targets.hidden, targets.head_weight, targets.head_bias, vocab)
        head.allocate(min(CHUNK_ROWS, len(targets)))
        return torch.cat(
            [
                _entropy(torch.log_softmax(head.finish(head.logits(head.states(index)), torch.float32), -1))
                for index in torch.arange(len(targets), device=targets.hidden.device).split(CHUNK_ROWS)
            ]
        )


@torch.no_grad()
def divergences(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: TeacherTargets,
    divergence: DivergenceConfig,
    temperature: float,
    vocab: int,
) -> Tensor:
    """D(teacher, student) [N], as the loss takes it, from a first pass through the student's head without gradients.

    Of several teachers it is sum_i w_i D(p_i, student), with a pass for each.
    """
    if isinstance(targets, SeveralTargets):
        rest = (divergence, temperature, vocab)
        found = [divergences(hidden, head_weight, head_bias, part, *rest) for part in targets.parts]
        return _weighted_sum(targets, found)
    with torch.autocast(hidden.device.type, enabled=False):
        student = Head(hidden, head_weight, head_bias, vocab)
        teacher = None
        if isinstance(targets, DenseTargets):
            teacher = Head(targets.hidden, targets.head_weight, targets.head_bias, vocab)
        for head in (student, teacher):
            if head is not None:
                head.allocate(min(CHUNK_ROWS, len(hidden)))
        values = []
        for index in torch.arange(len(hidden), device=hidden.device).split(CHUNK_ROWS):
            ones = torch.ones(len(index), device=hidden.device)
            rows = make_rows(torch.zeros_like(index), 0 * ones, ones, take(targets, index), vocab)
            logits = student.finish(student.logits(student.states(index)), torch.float32)
            reference = None
            if teacher is not None:
                reference = teacher.finish(teacher.logits(teacher.states(index)), torch.float32)
            values.append(row_loss(logits, reference, rows, divergence.bind(), temperature)[1])
        return torch.cat(values)


def _weighted_sum(targets: SeveralTargets, values: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * value for weight, value in zip(targets.weights, values, strict=True)]).sum(0)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs.clamp_min(LOG_FLOOR)).sum(-1)
