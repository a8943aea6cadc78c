"""NEON (Xu, Jin, Yang 2018): gradient descent that looks for a way down by differences of gradients: a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from limbeck.errors import ConfigError
from limbeck.optim.block import real_numel
from limbeck.optim.noise import NoiseKey, draw, parameter_id
from limbeck.optim.noisy import checked_seed, evaluate
from limbeck.optim.seed import agreed_seed
from limbeck.optim.settings import number, whole_number
from limbeck.optim.sharding import layout


class NEON(Optimizer):
    """NEON:  x <- x - lr g(x);  where ||g(x)|| <= g_thres, look for negative curvature first:

        u <- r zeta,   u <- u - lr (g(x + u) - g(x))   until ||u|| >= F,  at most `search_steps` times;   x <- x +- u

    Each u costs a gradient. x moves to the side whose loss is lower; where u does not grow there is no way down near,
    and the step is one of plain descent. One group of whole, real parameters.

    Args:
      lr: step size, and that of the search; theory: 1 / L.
      grad_threshold: g_thres.
      noise_radius: r, where the search starts.
      escape_distance: F; the length of the step out of the saddle.
      search_steps: gradients that a search may cost.
      seed: as in ASGLD.
    Raises: ConfigError for settings that cannot work, and for a step without a closure.
    Source: Xu, Jin, Yang 2018, arXiv:1711.01944, the search of algorithm 1 (NEON), from memory of it; we compare the
      losses of both sides where they choose one at random.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        grad_threshold: float,
        noise_radius: float,
        escape_distance: float,
        search_steps: int = 200,
        seed: int | None = None,
    ) -> None:
        values = {"lr": lr, "grad_threshold": grad_threshold, "noise_radius": noise_radius}
        for field, value in {**values, "escape_distance": escape_distance}.items():
            if not number("NEON", field, value) > 0:
                raise ConfigError(f"NEON: {field} is {value}; it must be positive.")
        if whole_number("NEON", "search_steps", search_steps) < 1 or noise_radius >= escape_distance:
            raise ConfigError("NEON: search_steps is at least 1, and escape_distance greater than noise_radius.")
        params = list(params)
        given = checked_seed("NEON", seed)
        settings = {
            **values,
            "escape_distance": escape_distance,
            "search_steps": search_steps,
            "seed": agreed_seed(params) if given is None else given,
            "searches": 0,
        }
        super().__init__(params, settings)
        if len(self.param_groups) > 1:
            raise ConfigError("NEON: parameters are one group.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the closure computes loss and gradients anew and is called once for each gradient."""
        if closure is None:
            raise ConfigError("NEON: a step needs a closure that computes the gradients, since a search takes many.")
        loss = evaluate(closure)
        (group,) = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        slope = [p.grad.detach().clone() for p in params]
        if _norm(slope) <= group["grad_threshold"]:
            way = self._search(params, slope, group, closure)
            if way is not None:
                self._leave(params, way, closure)
                return loss
        for p, g in zip(params, slope, strict=True):
            p.sub_(g, alpha=group["lr"])
        return loss

    def _search(
        self, params: list[Tensor], slope: list[Tensor], group: dict[str, Any], closure: Callable[[], Any]
    ) -> list[Tensor] | None:
        """u of norm F along negative curvature, or None; the parameters end where they began."""
        here = [p.clone() for p in params]
        std = group["noise_radius"] / math.sqrt(sum(real_numel(p) for p in params))
        keys = [NoiseKey(group["seed"], group["searches"], parameter_id(i)) for i in range(len(params))]
        u = [draw(key, layout(p), p.device).to(p.dtype) * std for key, p in zip(keys, params, strict=True)]
        group["searches"] += 1
        for _ in range(group["search_steps"]):
            for p, x, part in zip(params, here, u, strict=True):
                p.copy_(x + part)
            evaluate(closure)
            for part, p, g in zip(u, params, slope, strict=True):
                assert p.grad is not None
                part.sub_(p.grad - g, alpha=group["lr"])
            if _norm(u) >= group["escape_distance"]:
                break
        for p, x in zip(params, here, strict=True):
            p.copy_(x)
        size = _norm(u)
        return None if size < group["escape_distance"] else [part * (group["escape_distance"] / size) for part in u]

    def _leave(self, params: list[Tensor], way: list[Tensor], closure: Callable[[], Any]) -> None:
        """x + u or x - u, whichever has the lower loss."""
        losses = []
        for factor in (1.0, -2.0):
            for p, part in zip(params, way, strict=True):
                p.add_(part, alpha=factor)
            losses.append(float(evaluate(closure)))
        if losses[0] < losses[1]:
            for p, part in zip(params, way, strict=True):
                p.add_(part, alpha=2.0)


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
