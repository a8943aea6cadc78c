"""The int8 linear layer: torch's fbgemm product with one scale a token, whose rows do not depend on each other.

fbgemm's dynamic product takes one asymmetric range for the whole input and, without VNNI, adds two 8-bit products into
16 bits, which overflow. Both go away here:

1. Every row is divided by its own largest magnitude and the result multiplied by it: a scale a token. The range is
   then [-1, 1] whatever the rows are, and the form of the product that is told its range takes it. A row has the same
   bits in any batch.
2. Codes of weights stay in -63..63, so that 2 * 255 * 63 fits into 16 bits, and `reduce_range` is off.

What comes out is per-token W8A8 as compressed-tensors defines it (x / max|x| * 127.5 rounded, one scale an output).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import ModelError

LARGEST_CODE = 63
INPUT_SCALE, INPUT_ZERO = 2 / 255, 128
"""Of inputs in [-1, 1] as 8 bits without sign."""


class Int8Linear:
    """y = s_t s_o (round(x / s_t) codes^T) + bias, s_t of a token and s_o of an output."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None = None, where: str = "int8 layer") -> None:
        """Take the weight.

        Args:
          codes: int8 [O I], each in -63..63.
          scales: [O], one an output.
          bias: [O].
          where: the layer's name, for messages.
        Raises: ModelError for larger codes, or where torch has no fbgemm.
        """
        if not {"fbgemm", "x86"} & {torch.backends.quantized.engine}:
            raise ModelError(
                f"{where}: torch's quantised engine is {torch.backends.quantized.engine!r}; int8 needs fbgemm, which "
                "x86 builds of torch have. Use precision float32."
            )
        largest = max(-int(codes.min()), int(codes.max())) if codes.numel() else 0
        if largest > LARGEST_CODE:
            raise ModelError(
                f"{where}: int8 codes up to {largest}; the product is exact up to {LARGEST_CODE}. Quantise with "
                "`limbeck quantize --scheme w8a8`, which stays inside, or use precision float32."
            )
        self.outputs, self.inputs = codes.shape
        self.bias = None if bias is None else bias.float()
        self._codes: tuple[Tensor, Tensor] | None = (codes, scales.float())
        """Until they are packed, which the compiled kernels do for themselves."""

    @functools.cached_property
    def packed(self) -> Any:
        """The weight in the order in which torch's product reads it."""
        codes, scales = self.unpacked()
        points = torch.zeros(self.outputs, dtype=torch.int64)
        with warnings.catch_warnings():
            # The tensor type is deprecated, the packed product is not; there is no other way into it.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
            weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), points, 0)
        self._codes = None
        return torch.ops.quantized.linear_prepack(weight, None)

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Codes int8 [O I] and scales [O]."""
        if self._codes is not None:
            return self._codes
        weight, _ = torch.ops.quantized.linear_unpack(self.packed)
        return weight.int_repr(), weight.q_per_channel_scales().float()

    @classmethod
    def rounded(cls, weight: Tensor, bias: Tensor | None = None, where: str = "int8 layer") -> Int8Linear:
        """A dense weight [O I], each output rounded to the grid of its largest magnitude / 63."""
        scales = weight.float().abs().amax(1).div_(LARGEST_CODE)
        scales = torch.where(scales > 0, scales, 1.0)
        return cls((weight.float() / scales[:, None]).round_().to(torch.int8), scales, bias, where)

    @classmethod
    def joined(cls, parts: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None, where: str) -> Int8Linear:
        """Several layers over one input as one: their codes [O_i I] and scales [O_i] behind one another."""
        codes, scales = zip(*parts, strict=True)
        return cls(torch.cat(codes), torch.cat(scales), bias, where)

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [U I] -> [U O]; the bits of a row depend on that row alone."""
        # Not vector_norm, whose maximum is 15 times slower. A row of zeros stays one: 0 / tiny.
        peaks = x.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y = product(x / peaks, INPUT_SCALE, INPUT_ZERO, self.packed).mul_(peaks)
        return y if self.bias is None else y.add_(self.bias)
