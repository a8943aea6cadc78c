"""Norm and rotation, in the forms that training and the engine share."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_of(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + epsilon) [... D] and the factor [... 1], which is computed in float32."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scale = squares.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_().to(x.dtype)
    return x * scale, scale


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """Rotary embedding of [U N H] in place: the halves (a, b) become (a cos - b sin, b cos + a sin)."""
    first, second = x.chunk(2, dim=-1)
    turned = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).add_(turned, alpha=sign)
    return x


def rotate_alike_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same where a row must have the same bits in any company: products and sums apart, since a fused form rounds
    once where it is vectorised and twice where it is not."""
    first, second = x.chunk(2, dim=-1)
    by_second, by_first = second * sin, first * sin
    first.mul_(cos).sub_(by_second)
    second.mul_(cos).add_(by_first)
    return x
