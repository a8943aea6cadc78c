"""Sharpness-aware minimisation (Foret, Kleiner, Mobahi, Neyshabur 2021), for any optimizer: a baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from limbeck.errors import ConfigError
from limbeck.optim.block import members
from limbeck.optim.noisy import evaluate
from limbeck.optim.settings import number
from limbeck.optim.sharding import local, sum_over_shards
from limbeck.optim.wrapper import WrappingOptimizer


class SAM(WrappingOptimizer):
    """SAM:  e = rho g(x) / ||g(x)||,   x <- optimizer(x, g(x + e)).  Two gradients a step.

    Args:
      optimizer: takes the step; groups, state and defaults are its own.
      rho: length of the step uphill.
    Raises: ConfigError for a rho that is negative, and for a step without a closure.
    Source: Foret, Kleiner, Mobahi, Neyshabur 2021, arXiv:2010.01412, algorithm 1.
    """

    rho: float

    def __init__(self, optimizer: Optimizer, rho: float = 0.05) -> None:
        if not number("SAM", "rho", rho) >= 0:
            raise ConfigError(f"SAM: rho is {rho}; it must not be negative.")
        self._wrap(optimizer, rho=rho)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the closure computes the gradients anew and is called twice. Its first loss comes back."""
        if closure is None:
            raise ConfigError("SAM: a step needs a closure that computes the gradients, since it takes two of them.")
        loss = evaluate(closure)
        params = [p for p in members(self.param_groups) if p.grad is not None]
        before = [local(p.detach()).clone() for p in params]
        for p, push in zip(params, uphill([local(p.grad) for p in params], params, self.rho), strict=True):
            local(p.detach()).add_(push)
        evaluate(closure)
        for p, value in zip(params, before, strict=True):
            local(p.detach()).copy_(value)
        self.optimizer.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "rho": self.rho}


def uphill(grads: list[Tensor], params: list[Tensor], rho: float) -> list[Tensor]:
    """e = rho g / ||g||, of the local parts; 0 where the gradient is 0."""
    if not grads:
        return []
    squares = torch.stack([grad.float().square().sum() for grad in grads])
    norm = sum_over_shards(params, squares).sum().sqrt()
    scale = torch.where(norm > 0, rho / norm, 0.0)
    return [grad * scale.to(grad.device, grad.dtype) for grad in grads]
