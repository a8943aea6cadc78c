"""Token selection: KD on the positions of each sequence that matter most, the rest skipped before the student's head.

With n_i KD positions in sequence i and the fraction x, the k_i = max(1, floor(x n_i)) positions of highest score are
kept, and their coefficients grow by one factor so that they carry the whole KD weight of their sequence. Two things
follow: the denominators of a step are those without selection, known before any forward pass; and what is kept depends
on the sequence alone, not on the micro-batch, the rank or the layout it falls to. Of equal scores the first is kept.

Sources: SE-KD (arXiv 2602.01395), teacher entropy; TIP (arXiv 2604.14084), student-teacher divergence. Differs: the
share is taken within each sequence and not over a batch, which no split of the batch would leave unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.distill.divergence import LOG_FLOOR, DivergenceConfig
from limbeck.distill.head import Head
from limbeck.distill.rowloss import row_loss
from limbeck.distill.rows import make_rows
from limbeck.errors import ConfigError
from limbeck.teacher.targets import DenseTargets, TeacherTargets, TopKTargets
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
    if isinstance(targets, DenseTargets):
        return DenseTargets(targets.hidden[keep], targets.head_weight, targets.head_bias)
    if isinstance(targets, TopKTargets):
        return TopKTargets(targets.ids[keep], targets.log_probs[keep], targets.log_tail[keep])
    if targets is not None:
        raise _several()
    return None


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
    """Entropy in nats [N] of the teacher at temperature 1; over the K + 1 events of top-k targets."""
    if isinstance(targets, TopKTargets):
        return _entropy(torch.cat([targets.log_probs, targets.log_tail[:, None]], 1))
    if not isinstance(targets, DenseTargets):
        raise _several()
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
    """D(teacher, student) [N], as the loss takes it, from a first pass through the student's head without gradients."""
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


def _several() -> ConfigError:
    return ConfigError("supervision.select ranks by one teacher; name one, or leave select out.")


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs.clamp_min(LOG_FLOOR)).sum(-1)
