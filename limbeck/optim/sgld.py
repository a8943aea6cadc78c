"""Stochastic gradient Langevin dynamics (Welling and Teh 2011)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from limbeck.optim.noise import square_norm
from limbeck.optim.sampler import Sampler
from limbeck.optim.settings import LowPrecision, given


class SGLD(Sampler):
    """Stochastic gradient Langevin dynamics:  x <- x - lr (g + weight_decay x) + sqrt(2 lr T) xi,  xi ~ N(0, I).

    Near a minimum it samples exp(-f / T). On curvature a x^2 / 2 its stationary variance is T / (a (1 - lr a / 2)),
    exactly.

    Args:
      params: as ASGLD's.
      lr: step size; a schedule moves the noise with it.
      temperature: T; may differ between groups and be scheduled.
      weight_decay: precision of a Gaussian prior, in units of the mean loss.
      noise_steps: no noise from this step on; None: no end.
      low_precision: float16 and bfloat16 parameters. master: float32 copies in the state. nearest: plain rounding, in
        which small steps and small noise are lost.
      seed, maximize: as in ASGLD.
    Source: Welling and Teh 2011. ASGLD(mode="constant", noise_radius=theory.temperature_to_radius(T, lr, d)) is the
      same.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        temperature: float,
        weight_decay: float = 0.0,
        noise_steps: int | None = None,
        low_precision: LowPrecision = "master",
        seed: int | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, given(locals()))

    @classmethod
    def from_posterior(
        cls,
        params: Any,
        step_size: float,
        num_data: int,
        *,
        prior_precision: float = 0.0,
        beta: float = 1.0,
        **settings: Any,
    ) -> Self:
        """The posterior form:  x <- x - (e/2) (n beta grad_meanloss + prior_precision x) + sqrt(e) xi.

        Args:
          step_size: e.
          num_data: n; the gradients are those of the mean loss over any mini-batch.
          beta: inverse temperature of the likelihood; 1 is Bayes' posterior.
        """
        weight = num_data * beta
        return cls(
            params,
            step_size * weight / 2,
            temperature=1 / weight,
            weight_decay=prior_precision / weight,
            **settings,
        )

    def _update(
        self, x: Tensor, grad: Tensor, noise: Tensor | None, states: list[Tensor], settings: Mapping[str, Any]
    ) -> Tensor | float:
        lr = float(settings["lr"])
        if settings["weight_decay"]:
            x.mul_(1 - lr * settings["weight_decay"])
        x.add_(grad, alpha=-lr)
        if noise is None:
            return 0.0
        std = math.sqrt(2 * lr * float(settings["temperature"]))
        x.add_(noise, alpha=std)
        return square_norm(noise, std)
