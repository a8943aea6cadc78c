"""What a teacher says at N supervised positions: one of two tensor forms, or nothing (None, text only)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from limbeck.errors import ShapeError


@dataclass(frozen=True, slots=True)
class DenseTargets:
    """The teacher's last hidden states and its head; its logits `hidden @ head_weight.T` are made in chunks."""

    hidden: Tensor
    """[N D_teacher], any float dtype."""
    head_weight: Tensor
    """[V_teacher D_teacher]."""
    head_bias: Tensor | None = None
    """[V_teacher]."""

    def __len__(self) -> int:
        return len(self.hidden)


@dataclass(frozen=True, slots=True)
class TopKTargets:
    """The teacher's K largest log-probabilities a position, and the log of the mass that all other entries share."""

    ids: Tensor
    """int64 [N K], distinct within a row where they are entries; any value in padding."""
    log_probs: Tensor
    """float [N K], at temperature 1, natural logarithm, normalised over the whole vocabulary. Where rows have different
    numbers of entries, -inf marks the padding behind the last of them; the first is always an entry."""
    log_tail: Tensor
    """float [N]: log(1 - sum exp(log_probs)); -inf when nothing is left."""

    def __post_init__(self) -> None:
        if self.ids.shape != self.log_probs.shape or self.log_tail.shape != self.ids.shape[:1]:
            raise ShapeError(
                f"top-k targets: ids {tuple(self.ids.shape)}, log_probs {tuple(self.log_probs.shape)} and log_tail "
                f"{tuple(self.log_tail.shape)} do not fit; expected [N K], [N K], [N]."
            )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class SeveralTargets:
    """What several teachers say at the same N positions; the KD term is sum_i w_i D(p_i, q)."""

    parts: tuple[DenseTargets | TopKTargets, ...]
    weights: tuple[float, ...]
    """w_i of each part."""

    def __len__(self) -> int:
        return len(self.parts[0])


TeacherTargets = DenseTargets | TopKTargets | SeveralTargets | None
"""None: the teacher gives text only, so there is no KD term."""
