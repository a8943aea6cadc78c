"""Earlier perturbed methods, exactly as their papers give them: the baselines of ASGLD, ASG and AGLD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.optim.block import members
from limbeck.optim.langevin import Langevin, count
from limbeck.optim.settings import LowPrecision, NoiseScale, NoiseShape, given, number, whole_number
from limbeck.optim.sharding import local
from limbeck.optim.theory import from_constants


class PerturbedGD(Langevin):
    """Perturbed gradient descent: where ||g|| <= g_thres, at most once in t_thres steps, add a uniform ball's noise.

    When t_thres steps after a kick the loss has dropped by less than f_thres, the parameters from before the kick come
    back, `converged` turns true, and later steps do nothing.

    Args:
      params, lr, momentum, seed, maximize, foreach, low_precision: as in ASGLD; the gradients are full gradients.
      grad_threshold: g_thres.
      noise_radius: radius of the ball.
      escape_steps: t_thres.
      loss_drop: f_thres. The test needs the loss, so it is made only by `step(closure)`; None turns it off.
    Source: Jin, Ge, Netrapalli, Kakade, Jordan 2017, arXiv:1703.00887. Differs: the step that kicks uses the gradient
      from before the kick, where theirs takes a second gradient.
    """

    _counters = (*Langevin._counters, "kick_loss", "converged")

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        grad_threshold: float,
        noise_radius: float,
        escape_steps: int,
        loss_drop: float | None = None,
        momentum: float = 0.0,
        low_precision: LowPrecision = "stochastic",
        seed: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, {**given(locals()), "noise": "ball"})

    @classmethod
    def from_constants(
        cls,
        params: Any,
        *,
        L: float,
        rho: float,
        eps: float,
        delta: float,
        delta_f: float,
        c: float = 1.0,
        **settings: Any,
    ) -> Self:
        """With the settings of `theory.from_constants`; d is the number of parameters."""
        params = list(params)
        theory = from_constants(L, rho, eps, delta, delta_f, count(params), c)
        return cls(params, **theory._asdict(), **settings)

    @property
    def converged(self) -> bool:
        """Whether a kick has found no way down: the parameters are a second-order stationary point."""
        return bool(self.param_groups[0]["converged"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or none when converged; the loss that the closure returns decides on that."""
        if self.converged or closure is None or self.param_groups[0]["loss_drop"] is None:
            return super().step(closure) if not self.converged else None
        with torch.enable_grad():
            loss = closure()
        if self._has_failed(float(loss)):
            self._restore()
            return loss
        before = {p: p.detach().clone() for p in members(self.param_groups)} if self._may_fire() else {}
        super().step()
        self._remember(before, float(loss))
        return loss

    def _has_failed(self, loss: float) -> bool:
        first = self.param_groups[0]
        sign = -1.0 if first["maximize"] else 1.0
        due = first["fires"] > 0 and first["noise_step"] - first["last_fire"] == first["escape_steps"]
        return due and sign * (loss - first["kick_loss"]) > -first["loss_drop"]

    def _may_fire(self) -> bool:
        first = self.param_groups[0]
        return first["noise_step"] - first["last_fire"] > first["escape_steps"]

    def _remember(self, before: dict[Tensor, Tensor], loss: float) -> None:
        first = self.param_groups[0]
        if not before or first["last_fire"] != first["noise_step"] - 1:
            return
        for param, value in before.items():
            self.state[param]["before_kick"] = value
        for group in self.param_groups:
            group["kick_loss"] = loss

    def _restore(self) -> None:
        for param in members(self.param_groups):
            # A parameter that joined after the kick has nothing to go back to.
            local(param.detach()).copy_(local(self.state[param].get("before_kick", param.detach())))
        for group in self.param_groups:
            group["converged"] = True

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        whole_number("PerturbedGD", "escape_steps", group["escape_steps"])
        number("PerturbedGD", "grad_threshold", group["grad_threshold"])
        first = self.param_groups[0]
        for field in ("grad_threshold", "escape_steps", "loss_drop", "maximize"):
            if group[field] != first[field]:
                raise ConfigError(
                    f"PerturbedGD: {field} is {group[field]} in one group and {first[field]} in another; it is one."
                )


class PerturbedSGD(Langevin):
    """Perturbed SGD:  x <- x - lr (g + n),  n ~ N(0, (r^2 / d) I), at every step.

    Args:
      noise_radius: r, in units of the gradient.
      noise_scale: energy is the paper's; see ASGLD.
      params, lr, momentum, weight_decay, seed, ...: as in ASGLD.
    Source: Jin, Netrapalli, Ge, Kakade, Jordan 2019, arXiv:1902.04811, from memory of it.
    """

    _shape: NoiseShape = "gaussian"

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        noise_radius: float,
        noise_scale: NoiseScale = "energy",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        noise_steps: int | None = None,
        low_precision: LowPrecision = "stochastic",
        seed: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, {**given(locals()), "mode": "constant", "noise": self._shape})

    def _radius(self, group: dict[str, Any]) -> float:
        return float(group["lr"]) * float(group["noise_radius"])


class NoisySGD(PerturbedSGD):
    """Noisy SGD:  x <- x - lr (g + n),  n uniform on the sphere of radius r, at every step.

    Args: as PerturbedSGD's; the paper's sphere has radius 1.
    Source: Ge, Huang, Jin, Yuan 2015, arXiv:1503.02101, from memory of it.
    """

    _shape = "sphere"

    def __init__(self, params: Any, lr: float, *, noise_radius: float = 1.0, **settings: Any) -> None:
        super().__init__(params, lr, noise_radius=noise_radius, **settings)
