"""The supervised rows of a batch: what the loss takes a row of, checked once and cut together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.errors import ShapeError
from limbeck.models.sharded_softmax import Softmax
from limbeck.teacher.targets import OneTeacherTargets, TeacherTargets, check_ids


class Terms(NamedTuple):
    """Which terms some rows have. Who knows it vouches for ids too, so that nothing has to be asked of a device."""

    ce: bool
    kd: bool

    @classmethod
    def of(cls, ce_coef: Tensor, kd_coef: Tensor) -> Terms:
        """As the coefficients have it; a device is waited for."""
        return cls(bool((ce_coef != 0).any()), bool((kd_coef != 0).any()))


class SupervisedRows(NamedTuple):
    """The supervised positions of a micro-batch, all of length N."""

    rows: Tensor
    """int64, flat indices of the targets in the batch."""
    ce_coef: Tensor
    """float."""
    kd_coef: Tensor
    """float."""
    targets: TeacherTargets | None
    """None: the teacher gives text only, so there is no KD term."""

    def used(self) -> tuple[SupervisedRows, Tensor]:
        """The positions that still have a term, and which they are: bool [N]."""
        keep = (self.ce_coef != 0) | (self.kd_coef != 0)
        targets = None if self.targets is None else self.targets.take(keep)
        return SupervisedRows(self.rows[keep], self.ce_coef[keep], self.kd_coef[keep], targets), keep

    def by_teacher(self) -> Iterator[tuple[Tensor, Tensor, OneTeacherTargets | None]]:
        """CE and KD coefficients and targets of each teacher's pass; the CE term is in the first one alone."""
        if self.targets is None:
            yield self.ce_coef, self.kd_coef, None
            return
        ce_coef = self.ce_coef
        for targets, weight in self.targets.by_teacher():
            yield ce_coef, self.kd_coef * weight, targets
            ce_coef = torch.zeros_like(ce_coef)


@dataclass(frozen=True, slots=True)
class Rows:
    """The loss of n rows, all but the logits. Floats are of the compute type."""

    labels: Tensor | None
    """int64 [n 1]; None when no row has a CE term."""
    ce_coef: Tensor
    """[n 1]."""
    kd_coef: Tensor
    """[n 1]."""

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        labels = None if self.labels is None else self.labels[rows]
        return Rows(labels, self.ce_coef[rows], self.kd_coef[rows])

    def used(self) -> Tensor:
        """int64 [m]: the rows with a coefficient."""
        return torch.nonzero((self.ce_coef != 0) | (self.kd_coef != 0))[:, 0]

    def log_softmax(self, logits: Tensor, softmax: Softmax) -> Tensor | None:
        """[n V], where a row has a CE term."""
        return None if self.labels is None else softmax.log_softmax(logits)

    def add_cross_entropy_(self, gradient: Tensor, log_probs: Tensor | None, softmax: Softmax) -> Tensor:
        """CE [n]; adds ce_coef * dCE / dlogits to `gradient` [n V], and overwrites `log_probs` [n V]."""
        if log_probs is None or self.labels is None:
            return gradient.new_zeros(len(gradient))
        ce = -softmax.gather(log_probs, self.labels).squeeze(1)
        gradient.addcmul_(log_probs.exp_(), self.ce_coef)
        softmax.scatter_add_(gradient, self.labels, -self.ce_coef)
        return ce

    def weighted(self, ce: Tensor, kd: Tensor) -> Tensor:
        """The two sums [2] of coefficient times value."""
        return torch.stack([torch.dot(self.ce_coef[:, 0], ce), torch.dot(self.kd_coef[:, 0], kd)])


def make_rows(labels: Tensor, ce_coef: Tensor, kd_coef: Tensor, vocab: int, terms: Terms | None = None) -> Rows:
    """Labels and coefficients of N rows, checked unless `terms` are known; labels blanked where their coefficient is
    0."""
    with_ce = ce_coef != 0
    labels = labels.long().masked_fill(~with_ce, 0)
    if terms is None:
        check_ids("label", labels, vocab)
    has_ce = bool(with_ce.any()) if terms is None else terms.ce
    return Rows(
        labels=labels[:, None] if has_ce else None,
        ce_coef=ce_coef.detach()[:, None],
        kd_coef=kd_coef.detach()[:, None],
    )


def check_shapes(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    head_bias: Tensor | None,
    ce_coef: Tensor,
    kd_coef: Tensor,
    targets: OneTeacherTargets | None,
    vocab: int,
) -> None:
    """Refuse what does not fit: arguments of `fused_loss`.

    Raises: ShapeError.
    """
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ShapeError(
            f"fused_loss: hidden {tuple(hidden.shape)} and head_weight {tuple(head_weight.shape)}; "
            "expected [N D] and [V D]."
        )
    if not 0 < vocab <= len(head_weight):
        raise ShapeError(f"fused_loss: vocab_size {vocab} is not in 1 to {len(head_weight)}, the rows of the head.")
    if head_bias is not None:
        _check_shape("head_bias", head_bias, head_weight.shape[:1])
    for name, value in (("labels", labels), ("ce_coef", ce_coef), ("kd_coef", kd_coef)):
        _check_shape(name, value, hidden.shape[:1])
    if targets is not None and len(targets) != len(hidden):
        raise ShapeError(f"fused_loss: {len(targets)} teacher targets for {len(hidden)} rows; expected as many.")


def _check_shape(name: str, value: Tensor, expected: torch.Size) -> None:
    if value.shape != expected:
        raise ShapeError(f"fused_loss: {name} {tuple(value.shape)}; expected {tuple(expected)}.")
