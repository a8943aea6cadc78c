"""The grid that weights are rounded to, and weights on it: codes times scales.

Symmetric grids only, without zero points: engines load them everywhere (asymmetric int4 fails in transformers).
Source: the compressed-tensors checkpoint format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.errors import CompressionError, ConfigError
from limbeck.models import fp4

FP8_LARGEST = 448.0
"""Largest value of float8 E4M3."""
SMALLEST_SCALE = 1e-10
"""Of a group of zeros."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Codes of a given width, one scale for a group of inputs or for a whole output channel."""

    bits: int = 4
    """Width of a code, 2 to 8."""
    kind: str = "int"
    """int | float (8 bits: E4M3; 4 bits: E2M1)."""
    group_size: int | None = 128
    """Consecutive inputs that share a scale; null: all inputs of an output channel."""
    largest_code: int | None = None
    """Codes stay in -largest_code..largest_code; null: the whole width, -2^(bits-1)..2^(bits-1)-1. 63 at 8 bits keeps
    AVX2's 16-bit sums from overflowing, and costs little."""
    scale_dtype: torch.dtype = torch.float32
    """What scales are stored in: they are rounded to it before codes are chosen, so that codes suit what is read.
    E4M3 with `global_scale` (NVFP4) and E8M0, powers of two (MXFP4), too."""
    global_scale: float = 1.0
    """Scales are stored as E4M3 numbers of times this; see `fitted`."""

    def __post_init__(self) -> None:
        if self.kind not in ("int", "float"):
            raise ConfigError(f"kind must be int or float; found {self.kind!r}")
        if not 2 <= self.bits <= 8 or (self.kind == "float" and self.bits not in (4, 8)):
            raise ConfigError(f"bits must be 2 to 8, and 4 or 8 for kind float; found {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group_size must be positive or null; found {self.group_size}")
        if self.largest_code is not None and not 1 <= self.largest_code < 2 ** (self.bits - 1):
            raise ConfigError(f"largest_code must be in 1 to {2 ** (self.bits - 1) - 1}; found {self.largest_code}")

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest code."""
        if self.kind == "float":
            largest = FP8_LARGEST if self.bits == 8 else fp4.LARGEST
            return -largest, largest
        if self.largest_code is not None:
            return -self.largest_code, self.largest_code
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def groups(self, inputs: int, name: str = "layer") -> int:
        """Scales of an output channel.

        Raises: CompressionError when the group size does not divide the inputs.
        """
        if self.group_size is None:
            return 1
        if inputs % self.group_size:
            raise CompressionError(
                f"{name}: {inputs} inputs are no multiple of group_size {self.group_size}; choose one that divides "
                "them (32 and 64 do for most models) or null."
            )
        return inputs // self.group_size

    def round(self, values: Tensor) -> Tensor:
        """Nearest codes of values in units of the scale, as float32."""
        low, high = self.range
        if self.kind == "float" and self.bits == 4:
            return fp4.round_to_nearest(values)
        if self.kind == "float":
            return values.clamp(low, high).to(torch.float8_e4m3fn).float()
        return values.round().clamp_(low, high)

    def scales(self, weight: Tensor, name: str = "layer") -> Tensor:
        """Scales [O G] that just reach the largest weight of every group, and are never zero.

        Symmetric: the largest magnitude meets the largest positive code.
        """
        grouped = weight.float().view(len(weight), self.groups(weight.shape[1], name), -1)
        return self.storable((grouped.abs().amax(-1) / self.range[1]).clamp(min=SMALLEST_SCALE))

    def storable(self, scales: Tensor) -> Tensor:
        """Scales as this grid's dtype holds them, float32."""
        if self.scale_dtype == torch.float8_e8m0fnu:
            return fp4.power_of_two(scales)
        if self.scale_dtype == torch.float8_e4m3fn:
            return storable((scales * self.global_scale).clamp(max=FP8_LARGEST), self.scale_dtype) / self.global_scale
        return storable(scales, self.scale_dtype)

    def fitted(self, *weights: Tensor) -> Grid:
        """The grid for these weights, which share one global scale where it has one: its largest is E4M3's largest."""
        if self.scale_dtype != torch.float8_e4m3fn:
            return self
        largest = max(float(weight.abs().max()) for weight in weights)
        return replace(self, global_scale=FP8_LARGEST * self.range[1] / max(largest, SMALLEST_SCALE))


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive scales as a dtype holds them, float32: the nearest, or the next above where its steps are wide.

    Below the smallest normal number a scale that is rounded down, or to zero, would cut off the largest weights.
    """
    if dtype == torch.float32:
        return scales
    smallest = torch.finfo(dtype).smallest_normal
    step = smallest * torch.finfo(dtype).eps
    raised = (scales / step).ceil().clamp(min=1) * step
    return torch.where(scales < smallest, raised, scales.to(dtype).float())


class Quantized(NamedTuple):
    """Weights on a grid: weight = codes * scales, scales repeated over their group."""

    codes: Tensor
    """int8 [O I], or float8_e4m3fn [O I]."""
    scales: Tensor
    """float32 [O G]."""
    grid: Grid

    def dequantize(self) -> Tensor:
        """float32 [O I]."""
        return self.codes.float() * spread(self.scales, self.codes.shape[1])


def spread(scales: Tensor, inputs: int) -> Tensor:
    """Scales [O G] repeated to [O I]."""
    return scales.repeat_interleave(inputs // scales.shape[1], dim=1)


def encode(weight: Tensor, scales: Tensor, grid: Grid) -> Quantized:
    """Nearest codes of a weight [O I] for given scales [O G]."""
    codes = grid.round(weight.float() / spread(scales, weight.shape[1]))
    return Quantized(codes.to(torch.int8 if grid.kind == "int" else torch.float8_e4m3fn), scales, grid)
