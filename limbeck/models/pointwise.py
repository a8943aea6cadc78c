"""Chains of element-wise work between the products of a decoder layer, each one pass over memory on an accelerator.

A `Fused` function is plain torch; where an accelerator and a compiler for it are there, torch.compile makes of it the
kernels that it says. All arithmetic is in float32; what products read is returned in their number format.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from limbeck.progress import say

Result = TypeVar("Result")


class Fused:
    """A pure function of tensors that is compiled where that is possible."""

    def __init__(self, function: Callable[..., Any], kernels: int) -> None:
        self.function, self.kernels = function, kernels
        self._compiled: Callable[..., Any] | None = None
        functools.update_wrapper(self, function)

    def __call__(self, *given: Any) -> Any:
        if not (given[0].is_cuda and has_compiler()):
            return self.function(*given)
        if self._compiled is None:
            self._compiled = torch.compile(self.function, dynamic=True)
            try:
                return self._compiled(*given)
            except Exception as error:  # of the compiler, whatever its kind: slower is better than not at all
                say(f"note: {self.__name__} is not compiled ({' '.join(str(error).split())[:200]}).")  # type: ignore[attr-defined]
                self._compiled = self.function
        return self._compiled(*given)


@functools.cache
def has_compiler() -> bool:
    """Whether this torch computes on accelerators and Triton is there to compile for them."""
    return torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


def fused(kernels: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Mark a function as `Fused`, into so many kernels."""

    def mark(function: Callable[..., Result]) -> Callable[..., Result]:
        return Fused(function, kernels)

    return mark


@fused(kernels=1)
def added_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x + added, its norm weight (x + added) / rms, and the factor 1 / rms.

    Args:
      x: float32 [U D]; added: [U D] of any type, or None for nothing.
      weight: [D].
      dtype: of the norm.
    Returns: float32 [U D]; [U D]; float32 [U 1].
    """
    whole = x if added is None else x + added.float()
    scale = torch.rsqrt(whole.square().mean(-1, keepdim=True) + epsilon)
    return whole, (whole * scale * weight.float()).to(dtype), scale


@fused(kernels=1)
def norm_again(x: Tensor, scale: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm [U D] of x [U D] from its factor [U 1]."""
    return (x * scale * weight.float()).to(dtype)


@fused(kernels=3)
def norm_backward(
    by_normed: Tensor, by_x: Tensor, x: Tensor, scale: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by what went into a norm and beside it, and by its weight.

    With u = x scale and g = by_normed weight: by_x + scale (g - u mean(g u)), and the sum of by_normed u over tokens.

    Args:
      by_normed: [U D]; by_x: float32 [U D], what arrives beside the norm.
    Returns: float32 [U D], the same in the type of `by_normed`, float32 [D].
    """
    unit, given = x * scale, by_normed.float()
    by_unit = given * weight.float()
    found = by_x + scale * (by_unit - unit * (by_unit * unit).mean(-1, keepdim=True))
    return found, found.to(by_normed.dtype), (given * unit).sum(0)


@fused(kernels=2)
def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Rotary embedding of [U N H] and [U N_kv H]: the halves (a, b) become (a cos - b sin, b cos + a sin).

    Args:
      cos, sin: float32 [U 1 H/2].
      sign: -1 turns back, which is the transpose.
    """
    return _rotated(query, cos, sin * sign), _rotated(key, cos, sin * sign)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@fused(kernels=1)
def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, [U F]."""
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype)


@fused(kernels=1)
def gated_backward(by_gated: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) up once more, and the gradients by gate and up; all [U F]."""
    wide, given, other = gate.float(), by_gated.float(), up.float()
    share = torch.sigmoid(wide)
    silu = wide * share
    by_gate = given * other * (share + silu * (1 - share))
    return tuple(x.to(gate.dtype) for x in (silu * other, by_gate, given * silu))  # type: ignore[return-value]
