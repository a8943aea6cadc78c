"""What a gate measures: how close to stationary the parameters are, S, an estimate of ||grad f||."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.optim.sharding import local, local_like, sum_over_shards

FIRST_BLOCK, BLOCK = 4096, 65_536
"""Elements summed before the first look at the limit; the blocks after it double up to the second number."""
_NUMPY_TYPES = (torch.float32, torch.float64)
MARGIN = 1e-3
"""Relative error that the quick sum may have; closer to the limit than this, the exact sum decides."""


class Vector(NamedTuple):
    """Tensors that together make one vector, times one factor."""

    params: list[Tensor]
    """The parameters that the tensors belong to, as handed to the optimizer."""
    tensors: list[Tensor]
    """Local parts."""
    scale: float = 1.0


def vector_norm(vectors: Sequence[Vector], limit: float, is_plain: bool) -> float | Tensor:
    """||(scale_1 v_1, scale_2 v_2, ...)||, over all shards.

    On the CPU the sum stops once it has passed `limit`: what comes back is then a lower bound above the
    limit, and costs next to nothing. Below it the sum is exact to float32, whatever the sharding. An
    accelerator's result stays there, as a scalar.

    Args:
      is_plain: nothing is sharded.
    """
    if any(tensor.device.type != "cpu" for vector in vectors for tensor in vector.tensors):
        return _total(vectors, _device_squares(vectors)).sqrt()
    if limit == math.inf:
        return float(_total(vectors, _exact_squares(vectors)).sqrt().float())
    ceiling = (limit * (1 + MARGIN)) ** 2
    quick = _quick_sum(vectors, ceiling) if is_plain else float(_total(vectors, _quick_squares(vectors, ceiling)))
    if quick > ceiling:
        return math.sqrt(quick)
    return float(_total(vectors, _exact_squares(vectors)).sqrt().float())


def head_square(tensor: Tensor, ceiling: float) -> float:
    """The squared norm of a tensor's first elements, more of them when the first few stay below the ceiling.

    Returns: 0 where it takes more than a look at the host's memory.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in _NUMPY_TYPES or tensor.requires_grad:
        return 0.0
    if not tensor.is_contiguous():
        return 0.0
    # NumPy, because in the step of a small model a few small torch operations would cost a tenth of it.
    flat = tensor.numpy().ravel()
    for size in (FIRST_BLOCK, 4 * FIRST_BLOCK, BLOCK):
        head = flat[:size]
        square = float(head.dot(head))
        if square > ceiling or len(flat) <= size:
            break
    return square


def observed_norm(mean: float | Tensor, weight: float) -> Tensor:
    """sqrt of the bias-corrected average of estimates of ||grad f||^2; 0 where noise made the average negative."""
    return (torch.as_tensor(mean, dtype=torch.float64) / weight).clamp(min=0).sqrt()


def observed_snr(mean: float | Tensor, square: float | Tensor, weight: float, beta: float) -> Tensor:
    """The average of the estimates of ||grad f||^2 over twice its standard error: up to 1 it cannot be told
    from noise.

    Args:
      mean, square: running averages of the estimate and of its square, not bias-corrected.
      weight: sum of the weights of both averages.
      beta: decay of the averages, whose variance is (1 - beta) / (1 + beta) of one estimate's.
    """
    average = torch.as_tensor(mean, dtype=torch.float64) / weight
    variance = torch.as_tensor(square, dtype=torch.float64) / weight - average**2
    error = (variance.clamp(min=0) * (1 - beta) / (1 + beta)).sqrt()
    # One estimate alone says nothing about its error, so a positive one leaves the gate shut.
    return torch.where(average <= 0, 0.0, average / (2 * error))


def cross_product(params: list[Tensor], halves: list[Tensor]) -> Tensor:
    """<g_A, g_B> of two half-batches: an unbiased estimate of ||grad f||^2, float64.

    Args:
      params: their `.grad` is the gradient of the whole batch, (g_A + g_B) / 2.
      halves: what `.grad` was after the first half, g_A / 2, in the same order.
    """
    products = []
    for param, half in zip(params, halves, strict=True):
        first = local(half).double()
        assert param.grad is not None
        products.append((first * (local_like(param.grad, param).double() - first)).sum())
    return 4 * sum_over_shards(params, torch.stack(products)).sum()


def exact_squares(tensors: list[Tensor]) -> Tensor:
    """[P] squared norms in float64, which rounding to float32 makes independent of how a tensor was split."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return torch.tensor([_exact_square(tensor) for tensor in tensors], dtype=torch.float64)
    return torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64).square() for tensor in tensors])


def _exact_square(tensor: Tensor) -> float:
    flat = tensor.detach().flatten()
    # NumPy, as above; a block's float64 copy stays in the cache, which is faster than a norm over the whole.
    values = flat.numpy() if flat.dtype in _NUMPY_TYPES else flat.double().numpy()
    square = 0.0
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK].astype(np.float64)
        square += float(block.dot(block))
    return square


def _quick_sum(vectors: Sequence[Vector], ceiling: float) -> float:
    total = 0.0
    for vector in vectors:
        for tensor in vector.tensors:
            total += _until(tensor, vector.scale**2, ceiling - total)
            if total > ceiling:
                return total
    return total


def _quick_squares(vectors: Sequence[Vector], ceiling: float) -> Tensor:
    # One number a tensor, because tensors may lie on different ranks; a sum that has passed the ceiling goes
    # no further.
    squares, total = [], 0.0
    for vector in vectors:
        for tensor in vector.tensors:
            squares.append(0.0 if total > ceiling else _until(tensor, vector.scale**2, ceiling - total))
            total += squares[-1]
    return torch.tensor(squares, dtype=torch.float64)


def _until(tensor: Tensor, factor: float, ceiling: float) -> float:
    """The squared norm times `factor`, or a part of it that is above the ceiling."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.flatten()
    if flat.dtype is torch.float32 and flat.numel() <= FIRST_BLOCK:
        return factor * torch.dot(flat, flat).item()
    start, size, numel, square = 0, FIRST_BLOCK, flat.numel(), 0.0
    while start < numel:
        block = flat[start : start + size]
        if block.dtype not in (torch.float32, torch.float64):
            block = block.float()
        square += factor * torch.dot(block, block).item()
        if square > ceiling:
            break
        start, size = start + size, min(2 * size, BLOCK)
    return square


def _exact_squares(vectors: Sequence[Vector]) -> Tensor:
    return torch.cat([exact_squares(vector.tensors) * vector.scale**2 for vector in vectors])


def _device_squares(vectors: Sequence[Vector]) -> Tensor:
    norms = [norm.float() * vector.scale for vector in vectors for norm in torch._foreach_norm(vector.tensors)]
    device = next((norm.device for norm in norms if norm.device.type != "cpu"), norms[0].device)
    return torch.stack([norm.to(device) for norm in norms]).square()


def _total(vectors: Sequence[Vector], squares: Tensor) -> Tensor:
    return sum_over_shards([p for vector in vectors for p in vector.params], squares).sum()
