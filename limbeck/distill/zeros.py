"""Zeros of a pruned student that stay through training: N:M and unstructured patterns survive every optimizer.

Descent moves a zero by its gradient and by its momentum, a sampler by its noise. Both ends are held: gradients of
zeros are cleared before they are clipped, so that they count neither for the norm nor for a gate that reads it, and the
weights are cleared after the update. Which weights these are is read off once, from the weights that training starts
from; a resumed run and every rank read the same.
"""

from __future__ import annotations

import torch
from torch import nn

from limbeck.errors import ConfigError
from limbeck.optim.sharding import local, sum_over_shards

PRUNED_FROM = 0.05
"""Share of zeros from which a layer counts as pruned; fewer are chance."""


class KeptZeros:
    """The zeros of every pruned layer of a model, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        """Find the layers of which `PRUNED_FROM` or more is zero: matrices (experts included) but no embeddings.

        Raises: ConfigError when there is none.
        """
        matrices = _trained_matrices(model)
        zeros = [local(weight.detach()) == 0 for weight in matrices]
        counts = sum_over_shards(list(matrices), torch.stack([zero.sum(dtype=torch.float64) for zero in zeros]))
        found = zip(matrices, zeros, counts.tolist(), strict=True)
        self._zeros = [(weight, zero) for weight, zero, count in found if count >= PRUNED_FROM * weight.numel()]
        if not self._zeros:
            raise ConfigError(
                f"student.keep_zeros: no layer of the student has {PRUNED_FROM:.0%} zeros or more; start from a "
                "pruned model, or leave keep_zeros out."
            )

    def clear_gradients(self) -> None:
        """Set the gradients of the zeros to 0."""
        for weight, zero in self._zeros:
            if weight.grad is not None:
                local(weight.grad).masked_fill_(zero, 0)

    @torch.no_grad()
    def clear_weights(self) -> None:
        """Set what has moved off zero back."""
        for weight, zero in self._zeros:
            local(weight.detach()).masked_fill_(zero, 0)


def _trained_matrices(model: nn.Module) -> list[nn.Parameter]:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [p for p in model.parameters() if p.requires_grad and p.ndim >= 2 and id(p) not in embeddings]
