"""The stochastic gradient Nose-Hoover thermostat (Ding, Fang, Babbush, Chen, Skeel, Neven 2014)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.optim.block import Block
from limbeck.optim.gates import exact_squares
from limbeck.optim.noise import square_norm
from limbeck.optim.sampler import Sampler
from limbeck.optim.settings import LowPrecision, given, number
from limbeck.optim.sharding import local, sum_over_shards
from limbeck.optim.spread import plain


class SGNHT(Sampler):
    """SGNHT:  v <- (1 - c) v - lr (g + weight_decay x) + sqrt(2 a lr T) xi,   x <- x + v,

        c <- c + (1 - c / 2) v.v / n - lr T.

    The friction c, one number a group of n parameters, settles where v has the wanted temperature: it takes in the
    mini-batches' own noise, which SGHMC must be told of.

    Args:
      params, lr, temperature, weight_decay, noise_steps, low_precision, seed, maximize: as in SGLD.
      diffusion: a, the injected noise, and the first c.
    Source: Ding, Fang, Babbush, Chen, Skeel, Neven 2014, "Bayesian sampling using stochastic gradient thermostats",
      from memory of it: v = h p, lr = h^2, c = h xi, a = h A, with a temperature. Differs: the factor 1 - c/2, without
      which a step of finite friction makes x too cold by just that factor.
    """

    _counters = (*Sampler._counters, "thermostat")
    _state_names = ("velocity",)

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        temperature: float,
        diffusion: float = 0.1,
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
        (v,), lr = states, float(settings["lr"])
        v.mul_(1 - self._friction(settings)).add_(grad, alpha=-lr)
        if settings["weight_decay"]:
            v.add_(x, alpha=-lr * settings["weight_decay"])
        square: Tensor | float = 0.0
        if noise is not None:
            std = math.sqrt(2 * settings["diffusion"] * lr * float(settings["temperature"]))
            v.add_(noise, alpha=std)
            square = square_norm(noise, std)
        x.add_(v)
        return square

    def _conclude(self, block: Block) -> None:
        """c <- c + (1 - c/2) v.v / n - lr T."""
        group = block.group
        squares = exact_squares([local(self.state[param]["velocity"]) for param in block.params])
        # float32 hides the order in which shards were added up.
        mean = plain(sum_over_shards(block.params, squares).sum().float()) / max(1, block.numel)
        friction = self._friction(group)
        group["thermostat"] = friction + (1 - friction / 2) * mean - float(group["lr"]) * float(group["temperature"])

    def _friction(self, settings: Mapping[str, Any]) -> float | Tensor:
        return settings["diffusion"] if settings["thermostat"] is None else settings["thermostat"]

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not number("SGNHT", "diffusion", group["diffusion"]) > 0:
            raise ConfigError(f"SGNHT: diffusion is {group['diffusion']}; it must be positive.")
        if self._owner is not None:
            raise ConfigError(
                "SGNHT: its friction needs the velocities of all parameters, and ZeroRedundancyOptimizer hands each "
                "rank a share; shard with FSDP2."
            )
