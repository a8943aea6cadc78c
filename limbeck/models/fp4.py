"""Four-bit floats, E2M1: the nearest of 0, 1/2, 1, 3/2, 2, 3, 4, 6 and their negatives, two to a byte, low half first.

Source: OCP Microscaling Formats (MX) v1.0; the layout is that of compressed-tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.errors import ShapeError

LARGEST = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the lower three bits of a code; the fourth is the sign."""
_SMALLEST_EXPONENT, _LARGEST_EXPONENT, _EXPONENT_BIAS = -127, 127, 127


def round_to_nearest(values: Tensor) -> Tensor:
    """The nearest values, of two that are as near the one whose mantissa is even, as float32; beyond 6 it is 6."""
    sizes = values.float().abs()
    steps = torch.where(sizes < 2, 0.5, torch.where(sizes < 4, 1.0, 2.0))
    return ((sizes / steps).round() * steps).clamp(max=LARGEST).copysign(values.float())


def pack(values: Tensor) -> Tensor:
    """Values [O I] of the format to bytes [O I / 2].

    Raises: ShapeError for an odd number of columns.
    """
    if values.ndim != 2 or values.shape[1] % 2:
        raise ShapeError(f"pack: four-bit floats {list(values.shape)}; expected [O I] with an even I.")
    numbers = values.float()
    codes = torch.bucketize(numbers.abs().contiguous(), torch.tensor(VALUES)).to(torch.uint8)
    codes |= numbers.signbit().to(torch.uint8) << 3
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Bytes [O I / 2] to values [O I], as float8_e4m3fn, which holds them exactly."""
    halves = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    sizes = torch.tensor(VALUES)[(halves & 7).int()]
    return torch.where(halves >= 8, -sizes, sizes).to(torch.float8_e4m3fn)


def power_of_two(scales: Tensor) -> Tensor:
    """Positive scales s, by which the largest value is divided to be 6, as powers of two, as MX has them.

    2^ceil(log2(6 s / 7)): the largest value is then rounded to 4 or 6, and cut off by at most a seventh.
    """
    exponents = (scales * (LARGEST / 7)).log2().ceil()
    return exponents.clamp(_SMALLEST_EXPONENT, _LARGEST_EXPONENT).exp2()


def to_exponents(scales: Tensor) -> Tensor:
    """Powers of two as E8M0 bytes."""
    return (scales.log2().round() + _EXPONENT_BIAS).to(torch.uint8)


def from_exponents(exponents: Tensor) -> Tensor:
    """E8M0 bytes as float32."""
    return (exponents.float() - _EXPONENT_BIAS).exp2()
