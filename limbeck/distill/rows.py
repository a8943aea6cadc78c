"""The supervised rows of a batch: labels, coefficients and top-k targets, checked once and cut together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from limbeck.errors import ShapeError
from limbeck.teacher.targets import TeacherTargets, TopKTargets


@dataclass(frozen=True, slots=True)
class Rows:
    """The loss of n rows, all but the logits. Floats are of the compute type."""

    labels: Tensor | None
    """int64 [n 1]; None when no row has a CE term."""
    ce_coef: Tensor
    """[n 1]."""
    kd_coef: Tensor
    """[n 1]."""
    topk: TopKTargets | None
    """[n K]; None when the teacher is dense or absent."""

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        topk = self.topk
        return Rows(
            None if self.labels is None else self.labels[rows],
            self.ce_coef[rows],
            self.kd_coef[rows],
            None if topk is None else TopKTargets(topk.ids[rows], topk.log_probs[rows], topk.log_tail[rows]),
        )


def make_rows(labels: Tensor, ce_coef: Tensor, kd_coef: Tensor, targets: TeacherTargets, vocab: int) -> Rows:
    """Labels, coefficients and top-k targets, checked; blanked where their coefficient is 0."""
    with_ce, with_kd = ce_coef != 0, kd_coef != 0
    if targets is None and bool(with_kd.any()):
        raise ShapeError("fused_loss: kd_coef is not 0 but targets is None; give targets, or kd_coef 0.")
    labels = labels.long().masked_fill(~with_ce, 0)
    _check_ids("label", labels, vocab)
    topk = None
    if isinstance(targets, TopKTargets) and bool(with_kd.any()):
        some_ids = torch.arange(targets.ids.shape[1], device=labels.device)
        topk = TopKTargets(
            ids=torch.where(with_kd[:, None], targets.ids, some_ids),
            log_probs=targets.log_probs.to(ce_coef.dtype).masked_fill(~with_kd[:, None], 0.0),
            log_tail=targets.log_tail.to(ce_coef.dtype).masked_fill(~with_kd, 0.0),
        )
        # Padding repeats the row's first entry, so that it takes nothing out of the rest.
        topk = replace(topk, ids=torch.where(topk.log_probs == -torch.inf, topk.ids[:, :1], topk.ids))
        _check_ids("top-k id", topk.ids, vocab)
    return Rows(
        labels=labels[:, None] if bool(with_ce.any()) else None,
        ce_coef=ce_coef.detach()[:, None],
        kd_coef=kd_coef.detach()[:, None],
        topk=topk,
    )


def _check_ids(name: str, ids: Tensor, vocab: int) -> None:
    bad = (ids < 0) | (ids >= vocab)
    if bool(bad.any()):
        where = torch.nonzero(bad)[0].tolist()
        raise ShapeError(
            f"fused_loss: {name} {int(ids[tuple(where)])} at row {where[0]} is outside the vocabulary of "
            f"{vocab}; give rows without a target a coefficient of 0."
        )


def check_shapes(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    head_bias: Tensor | None,
    ce_coef: Tensor,
    kd_coef: Tensor,
    targets: TeacherTargets,
    vocab: int,
) -> None:
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ShapeError(
            f"fused_loss: hidden {tuple(hidden.shape)} and head_weight {tuple(head_weight.shape)}; "
            "expected [N D] and [V D]."
        )
    if not 0 < vocab <= len(head_weight):
        raise ShapeError(f"fused_loss: vocab_size {vocab} is not in 1 to {len(head_weight)}, the rows of the head.")
    if head_bias is not None and head_bias.shape != head_weight.shape[:1]:
        raise ShapeError(f"fused_loss: head_bias {tuple(head_bias.shape)}; expected {tuple(head_weight.shape[:1])}.")
    for name, value in (("labels", labels), ("ce_coef", ce_coef), ("kd_coef", kd_coef)):
        if value.shape != hidden.shape[:1]:
            raise ShapeError(f"fused_loss: {name} {tuple(value.shape)}; expected {tuple(hidden.shape[:1])}.")
    if targets is not None and len(targets) != len(hidden):
        raise ShapeError(f"fused_loss: {len(targets)} teacher targets for {len(hidden)} rows; expected as many.")
