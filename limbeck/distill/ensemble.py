"""Several teachers: the KD term is sum_i w_i D(p_i, q), one fused loss a teacher over the same hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.distill.fused import FusedLoss, fused_loss
from limbeck.ledger import Ledger
from limbeck.teacher.targets import SeveralTargets, TeacherTargets
from limbeck.traces.batch import Batch, Example


@dataclass(frozen=True, slots=True)
class SeveralTeachers:
    """Asks every teacher in turn."""

    teachers: tuple[Any, ...]
    weights: tuple[float, ...]

    @property
    def in_step(self) -> bool:
        """Whether all processes must ask together."""
        return any(teacher.in_step for teacher in self.teachers)

    def targets(self, batch: Batch, examples: Sequence[Example], rows: Tensor, ledger: Ledger) -> SeveralTargets:
        """The targets of all teachers for the tokens at flat indices `rows` of the batch."""
        parts = tuple(teacher.targets(batch, examples, rows, ledger) for teacher in self.teachers)
        return SeveralTargets(parts, self.weights)


def weighted_fused_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    ce_coef: Tensor,
    kd_coef: Tensor,
    targets: TeacherTargets,
    **rest: Any,
) -> FusedLoss:
    """`fused_loss`, with the KD term summed over weighted teachers where there are several.

    sum_i ce_coef_i CE_i + kd_coef_i T^2 sum_j w_j D(p_ij, q_i); the CE term is in the first teacher's pass alone.
    """
    if not isinstance(targets, SeveralTargets):
        return fused_loss(hidden, head_weight, labels, ce_coef=ce_coef, kd_coef=kd_coef, targets=targets, **rest)
    losses = [
        fused_loss(
            hidden,
            head_weight,
            labels,
            ce_coef=ce_coef if index == 0 else torch.zeros_like(ce_coef),
            kd_coef=kd_coef * weight,
            targets=part,
            **rest,
        )
        for index, (part, weight) in enumerate(zip(targets.parts, targets.weights, strict=True))
    ]
    total, ce_sum, kd_sum = (
        torch.stack([getattr(loss, name) for loss in losses]).sum() for name in ("total", "ce_sum", "kd_sum")
    )
    return FusedLoss(total, ce_sum, kd_sum, sum(loss.head_rows for loss in losses))
