"""Gradients that are found in the forward pass, and handed over in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.distill.gathered import own_rows
from limbeck.models.sharded_softmax import ShardedSoftmax


class KnownGradients(torch.autograd.Function):
    """Gives `total` the gradients that are already there."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: Gradients, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, from_above: Tensor) -> tuple[Tensor | None, ...]:
        # Mostly 1: then the head's gradient, the largest tensor of a step, is handed over and not copied; a device is
        # not asked, since waiting for its answer takes longer.
        one = not from_above.is_cuda and bool(from_above == 1)
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *(g if g is None else (g if one else g * from_above).to(t) for g, t in gradients)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of the total, by each input that wants one."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(compute: torch.dtype, *inputs: Tensor | None) -> Gradients:
        def zeros(x: Tensor | None) -> Tensor | None:
            if x is None or not (x.requires_grad and torch.is_grad_enabled()):
                return None
            return torch.zeros_like(x, dtype=compute)

        hidden, weight, bias = (zeros(x) for x in inputs)
        return Gradients(hidden, weight, bias)

    def of_rows(self, part: ShardedSoftmax, length: int) -> Gradients:
        """With the hidden gradient of this process's rows alone, from what all parts of the vocabulary add to it."""
        own = None if self.hidden is None else own_rows(part.group, self.hidden, length)
        return Gradients(own, self.weight, self.bias)

    def add(
        self, index: Tensor, states: Tensor, by_logits: Tensor, weight: Tensor, by_states: Tensor | None = None
    ) -> None:
        """Add what the rows `index` contribute: `by_logits` [n V] through their logits, `by_states` [n D] directly."""
        if self.hidden is not None:
            by_hidden = torch.mm(by_logits, weight).to(self.hidden.dtype)
            self.hidden.index_copy_(0, index, by_hidden if by_states is None else by_hidden.add_(by_states))
        if self.weight is not None and self.weight.dtype == by_logits.dtype:
            self.weight[: len(weight)].addmm_(by_logits.T, states)
        elif self.weight is not None and torch.version.cuda is not None and by_logits.is_cuda:
            total = self.weight[: len(weight)]
            torch.addmm(total, by_logits.T, states, out_dtype=total.dtype, out=total)  # summed in the product
        elif self.weight is not None:
            self.weight[: len(weight)].add_(torch.mm(by_logits.T, states))
        if self.bias is not None:
            self.bias[: len(weight)].add_(by_logits.sum(0, dtype=self.bias.dtype))
