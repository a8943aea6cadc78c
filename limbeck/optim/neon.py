"""NEON (Xu, Jin, Yang 2018): gradient descent that looks for a way down by differences of gradients: a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from limbeck.errors import ConfigError
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the only group.

        Raises: ConfigError for a second one, and for parameters that are sharded or complex.
        """
        if self.param_groups:
            raise ConfigError("NEON: parameters are one group.")
        super().add_param_group(param_group)
        if any(isinstance(p, DTensor) or p.is_complex() for p in self.param_groups[0]["params"]):
            self.param_groups.clear()
            raise ConfigError("NEON: parameters must be whole and real; found a sharded or a complex one.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the closure computes loss and gradients anew and is called once for each gradient."""
        if closure is None:
            raise ConfigError("NEON: a step needs a closure that computes the gradients, since a search takes many.")
        loss = evaluate(closure)
        (group,) = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        here, slope = _flat(params), _flat([p.grad for p in params])
        if slope.double().norm() <= group["grad_threshold"]:
            way = self._search(params, here, slope, closure)
            if way is not None:
                sides = [(float(self._look(params, here + u, closure)), here + u) for u in (way, -way)]
                _put(params, min(sides, key=lambda side: side[0])[1])
                return loss
        _put(params, here - group["lr"] * slope)
        return loss

    def _search(self, params: list[Tensor], here: Tensor, slope: Tensor, closure: Callable[[], Any]) -> Tensor | None:
        """u of norm F along negative curvature, or None."""
        (group,) = self.param_groups
        keys = [NoiseKey(group["seed"], group["searches"], parameter_id(i)) for i in range(len(params))]
        noise = _flat([draw(key, layout(p), p.device) for key, p in zip(keys, params, strict=True)])
        u = group["noise_radius"] / math.sqrt(max(1, len(noise))) * noise.to(here.dtype)
        group["searches"] += 1
        for _ in range(group["search_steps"]):
            self._look(params, here + u, closure)
            u = u - group["lr"] * (_flat([p.grad for p in params]) - slope)
            size = u.double().norm()
            if size >= group["escape_distance"]:
                return u * float(group["escape_distance"] / size)
        return None

    def _look(self, params: list[Tensor], there: Tensor, closure: Callable[[], Any]) -> Any:
        """The loss at another point; the gradients are those of there then."""
        _put(params, there)
        return evaluate(closure)


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]) if tensors else torch.zeros(0)


def _put(params: list[Tensor], point: Tensor) -> None:
    for p, part in zip(params, point.split([p.numel() for p in params]), strict=True):
        p.copy_(part.view_as(p))
