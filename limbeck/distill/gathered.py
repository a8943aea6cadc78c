"""The rows of all processes of a group behind one another, for a loss whose vocabulary is shared out over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.models.sharded_softmax import gather_parts
from limbeck.teacher.targets import OneTeacherTargets

# torch 2.13 gave it a new name.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Gathered(NamedTuple):
    """What `fused_loss` takes a row of, each process's rows padded to the longest."""

    hidden: Tensor
    labels: Tensor
    ce_coef: Tensor
    kd_coef: Tensor
    targets: OneTeacherTargets | None


def gather_rows(
    group: dist.ProcessGroup,
    hidden: Tensor,
    labels: Tensor,
    ce_coef: Tensor,
    kd_coef: Tensor,
    targets: OneTeacherTargets | None,
) -> Gathered:
    """The rows of all processes; what pads them has coefficients of 0. Arguments as for `fused_loss`, detached."""
    width = 0 if targets is None else targets.width
    length, width = _largest([len(hidden), width], hidden.device, group)

    def all_rows(tensor: Tensor) -> Tensor:
        padded = tensor.new_zeros(length, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        return gather_parts(padded, group)

    if targets is not None:
        targets = targets.widened(width).map_rows(all_rows)
    hidden, labels, ce_coef, kd_coef = (all_rows(tensor.detach()) for tensor in (hidden, labels, ce_coef, kd_coef))
    return Gathered(hidden, labels, ce_coef, kd_coef, targets)


def own_rows(group: dist.ProcessGroup, parts: Tensor, length: int) -> Tensor:
    """This process's `length` rows of a gradient by `gather_rows`'s hidden states, summed over the parts."""
    own = parts.new_empty(len(parts) // group.size(), *parts.shape[1:])
    _reduce_scatter(own, parts, group=group)
    return own[:length]


def _largest(numbers: list[int], device: torch.device, group: dist.ProcessGroup) -> list[int]:
    tensor = torch.tensor(numbers, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor.tolist()
