"""The local part of a parameter: where it lies in the logical tensor, and sums over the ranks that hold the rest."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from limbeck.errors import ConfigError


class Layout(NamedTuple):
    """A box of a logical tensor. Complex tensors are seen as real ones with a last dimension of 2."""

    shape: tuple[int, ...]
    """Of the logical tensor."""
    local_shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the box is one run of the logical tensor's row-major elements."""
        return self.local_shape[1:] == self.shape[1:]

    def span(self) -> tuple[int, int]:
        """First and last + 1 element to make: those of the box, or of the whole rows that it crosses."""
        if not self.shape:
            return 0, 1
        if 0 in self.local_shape:
            return 0, 0
        row = math.prod(self.shape[1:])
        return self.offset[0] * row, (self.offset[0] + self.local_shape[0]) * row

    def cut(self, flat: Tensor) -> Tensor:
        """The box out of the elements that `span` names."""
        if self.is_contiguous or 0 in self.local_shape:
            return flat.view(self.local_shape)
        rows = flat.view(self.local_shape[0], *self.shape[1:])
        window = [slice(start, start + size) for start, size in zip(self.offset, self.local_shape, strict=True)]
        return rows[(slice(None), *window[1:])]


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this rank, sharing its memory, as real numbers."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def local_like(grad: Tensor, param: Tensor) -> Tensor:
    """The part of `grad` that belongs to `param`'s local part."""
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def layout(param: Tensor) -> Layout:
    """Where the local part of `param` lies.

    Raises: ConfigError for placements whose local part is no box of the logical tensor.
    """
    pair = (2,) if param.is_complex() else ()
    shape = (*param.shape, *pair)
    if not isinstance(param, DTensor):
        return Layout(shape, shape, (0,) * len(shape))
    if any(isinstance(placement, _StridedShard) for placement in param.placements):
        local_shape, offset = _strided_box(param)
    else:
        for placement in param.placements:
            if not placement.is_replicate() and type(placement) is not Shard:
                raise _unknown(param)
        local_shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return Layout(shape, (*local_shape, *pair), (*offset, *(0 for _ in pair)))


def _strided_box(param: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The local part of a parameter that FSDP2 sharded after tensor parallelism did: plain shards are cut first."""
    shape, offset = list(param.shape), [0] * param.ndim
    coordinate = param.device_mesh.get_coordinate()
    strided = [i for i, placement in enumerate(param.placements) if isinstance(placement, _StridedShard)]
    plain = [i for i, placement in enumerate(param.placements) if isinstance(placement, Shard)]
    if coordinate is None or len(strided) + len(plain) + sum(p.is_replicate() for p in param.placements) != len(
        param.placements
    ):
        raise _unknown(param)
    for i in (*plain, *reversed(strided)):
        dim = param.placements[i].dim  # type: ignore[attr-defined]
        chunk = -(-shape[dim] // param.device_mesh.size(i))
        start = min(chunk * coordinate[i], shape[dim])
        offset[dim], shape[dim] = offset[dim] + start, min(chunk, shape[dim] - start)
    if tuple(shape) != tuple(param.to_local().shape):
        raise _unknown(param)
    return tuple(shape), tuple(offset)


def _unknown(param: DTensor) -> ConfigError:
    return ConfigError(
        f"a parameter of shape {tuple(param.shape)} placed as {param.placements} cannot get noise; use Shard and "
        "Replicate placements, or FSDP2 over tensor parallelism."
    )


def sum_over_shards(params: list[Tensor], values: Tensor) -> Tensor:
    """Add up, over the ranks that share a parameter, one number a parameter.

    Args:
      values: [P], any float dtype: each rank's part of the sum. Replicated parts are counted once.
    Returns: [P], the same on every rank.
    """
    # In the order of the parameters, which is the same on every rank; that of a set is not.
    pairs = dict.fromkeys((p.device_mesh, i) for p in params if isinstance(p, DTensor) for i in _sharded(p))
    for mesh, dimension in pairs:
        shares = torch.tensor(
            [isinstance(p, DTensor) and p.device_mesh == mesh and dimension in _sharded(p) for p in params]
        )
        part = torch.where(shares.to(values.device), values, 0)
        dist.all_reduce(part, group=mesh.get_group(dimension))
        values = torch.where(shares.to(values.device), part, values)
    return values


def _sharded(param: DTensor) -> list[int]:
    return [i for i, placement in enumerate(param.placements) if _is_split(placement)]


def _is_split(placement: Placement) -> bool:
    return isinstance(placement, Shard | _StridedShard)
