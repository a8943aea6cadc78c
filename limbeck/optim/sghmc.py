"""Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox, Guestrin 2014)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.optim.noise import square_norm
from limbeck.optim.sampler import Sampler
from limbeck.optim.settings import LowPrecision, given, number


class SGHMC(Sampler):
    """SGHMC:  v <- (1 - a) v - lr (g + weight_decay x) + sqrt(2 (a - b) lr T) xi,   x <- x + v.

    It samples exp(-f / T) as lr goes to 0, and moves farther than SGLD between two samples that are as good as
    independent. lr is that of SGD with momentum 1 - a.

    Args:
      params, lr, temperature, weight_decay, noise_steps, low_precision, seed, maximize: as in SGLD.
      friction: a, in (0, 1].
      gradient_noise: b, the friction that the mini-batches' own noise stands for: lr V / (2 T), V its variance a
        coordinate. 0 leaves that noise in.
    Source: Chen, Fox, Guestrin 2014, arXiv:1402.4102, equation 15, with a temperature.
    """

    _state_names = ("velocity",)

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        temperature: float,
        friction: float = 0.1,
        gradient_noise: float = 0.0,
        weight_decay: float = 0.0,
        noise_steps: int | None = None,
        low_precision: LowPrecision = "master",
        seed: int | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, given(locals()))

    def _update(
        self, x: Tensor, grad: Tensor, noise: Tensor | None, states: list[Tensor], settings: Mapping[str, Any]
    ) -> Tensor | float:
        (v,), lr, friction = states, float(settings["lr"]), settings["friction"]
        v.mul_(1 - friction).add_(grad, alpha=-lr)
        if settings["weight_decay"]:
            v.add_(x, alpha=-lr * settings["weight_decay"])
        square: Tensor | float = 0.0
        if noise is not None:
            std = math.sqrt(2 * (friction - settings["gradient_noise"]) * lr * float(settings["temperature"]))
            v.add_(noise, alpha=std)
            square = square_norm(noise, std)
        x.add_(v)
        return square

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        friction = number("SGHMC", "friction", group["friction"])
        if not 0 < friction <= 1:
            raise ConfigError(f"SGHMC: friction is {friction}; it lies in (0, 1].")
        if not 0 <= number("SGHMC", "gradient_noise", group["gradient_noise"]) <= friction:
            raise ConfigError(
                f"SGHMC: gradient_noise is {group['gradient_noise']}; it lies between 0 and friction, {friction}."
            )
