"""The logits of some positions of a model from their last hidden states: a chunk at a time, or few of them at once."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.models.parts import Head


class ChunkedLogits:
    """A model's last hidden states and its output matrix, with one buffer for the logits of a chunk."""

    def __init__(self, hidden: Tensor, head: Head, entries: int, largest: int | None = None) -> None:
        """Over the first `entries` rows of `head`; of a head in parts, `largest` is the most that a process has."""
        weight, bias, self.softcap = head
        self.hidden = hidden.detach()
        self.weight = weight.detach()[:entries].to(_product_dtype(hidden, weight))
        self.bias = None if bias is None else bias.detach()[:entries]
        self.buffer = self.weight.new_empty(0)
        self.row_bytes = (len(self.weight) if largest is None else largest) * self.weight.element_size()
        """Bytes of a row of logits."""

    def allocate(self, rows: int) -> None:
        """Make room for the logits of so many positions."""
        self.buffer = self.weight.new_empty(rows, len(self.weight))

    def states(self, index: Tensor) -> Tensor:
        """[n D], in the type of the products."""
        return self.hidden[index].to(self.weight.dtype)

    def logits(self, states: Tensor) -> Tensor:
        """[n V] without the bias; overwrites what the call before returned."""
        return torch.mm(states, self.weight.T, out=self.buffer[: len(states)])

    def finish(self, logits: Tensor, compute: torch.dtype) -> Tensor:
        """A block of `logits` with bias and cap, in the compute type: in place where it has that type."""
        logits = logits.to(compute)
        if self.bias is not None:
            logits.add_(self.bias)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, finished: Tensor) -> Tensor | None:
        """Derivative of finished logits z by what was capped, 1 - (z / c)^2; None without a cap."""
        return None if self.softcap is None else 1 - (finished / self.softcap).square_()


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """All logits [N V] of hidden states [N D] at once, in float32 (float64 for float64 states): for small heads."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = head.logits(hidden.to(head.weight.dtype))
        return logits if logits.dtype == torch.float64 else logits.float()


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the products with the head: the type of the inputs or of autocast, but float32 where that one fails.

    On a CPU, products of half types can be a hundred times slower than those of float32. In float16, the gradient by
    the logits (probabilities divided by the number of tokens) would underflow.
    """
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if dtype == torch.float16 or (device == "cpu" and dtype == torch.bfloat16) else dtype
