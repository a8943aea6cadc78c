"""SGLD and its preconditioned form: samplers that add noise at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from limbeck.errors import ConfigError
from limbeck.optim.block import Block
from limbeck.optim.injection import NoisyOptimizer
from limbeck.optim.langevin import Langevin
from limbeck.optim.noise import SIGNS, draw
from limbeck.optim.settings import LowPrecision, chosen
from limbeck.optim.sharding import local, sum_over_shards


class SGLD(Langevin):
    """Stochastic gradient Langevin dynamics:  x <- x - lr (g + weight_decay x) + sqrt(2 lr T) xi,  xi ~ N(0,
    I).

    Near a minimum it samples exp(-f / T). On curvature a x^2 / 2 its stationary variance is T / (a (1 - lr a
    / 2)), exactly.

    Args:
      params: as ASGLD's.
      lr: step size; a schedule moves the noise with it.
      temperature: T; may differ between groups and be scheduled.
      weight_decay: precision of a Gaussian prior, in units of the mean loss.
      low_precision, seed, maximize, foreach, noise_steps: as in ASGLD.
    Source: Welling and Teh 2011. ASGLD(mode="constant", noise_radius=theory.temperature_to_radius(T, lr, d))
      is the same.
    """

    _needs_radius = False

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        temperature: float,
        weight_decay: float = 0.0,
        noise_steps: int | None = None,
        low_precision: LowPrecision = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        settings = chosen(locals())
        super().__init__(params, {**settings, "mode": "constant", "noise_scale": "coordinate"})

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

    def _prepare_group(self, group: dict[str, Any]) -> None:
        super()._prepare_group(group)
        if not group["temperature"] >= 0:
            raise ConfigError(f"{type(self).__name__}: temperature is {group['temperature']}; it must not be negative.")

    def _radius(self, group: dict[str, Any]) -> float:
        return math.sqrt(2 * float(group["lr"]) * group["temperature"])


class PSGLD(NoisyOptimizer):
    """Preconditioned SGLD:  x <- x - lr G g + lr T Gamma + sqrt(2 lr T G) xi,  G = 1 / (eps + sqrt(V)).

    V is the running average of g^2 and Gamma_i = dG_i / dx_i = -(1 - alpha) G_i^2 g_i H_ii / sqrt(V_i), whose
    Hessian diagonal H_ii is estimated by v_i (H v)_i with random signs v.

    Args:
      lr, temperature, weight_decay, seed: as in SGLD.
      alpha: decay of V.
      eps: floor of sqrt(V).
      correction: keep Gamma; the gradients must then come from `loss.backward(create_graph=True)`. Without it
        the stationary distribution is biased by an amount that vanishes as alpha goes to 1.
    Source: Li, Chen, Carlson, Carin 2016, arXiv:1512.07666, with lr = e n / 2 and T = 1 / n. We estimate the
      Hessian diagonal; they drop Gamma.
    """

    _needs_radius = False

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        temperature: float,
        alpha: float = 0.99,
        eps: float = 1e-5,
        correction: bool = True,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        settings = chosen(locals())
        super().__init__(
            params, {**settings, "mode": "constant", "noise_scale": "coordinate", "low_precision": "nearest"}
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the closure, if any, computes the gradients (with a graph when `correction` is on).

        Raises: ConfigError when `correction` is on and the gradients have no graph.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        blocks = self._gather()
        diagonals = [self._hessian_diagonal(block) for block in blocks]
        with torch.no_grad():
            amounts = self._decide(blocks)
            squares = [self._update(*each) for each in zip(blocks, diagonals, amounts, strict=True)]
            self._noise_square = sum(squares)
        return loss

    def _radius(self, group: dict[str, Any]) -> float:
        return math.sqrt(2 * float(group["lr"]) * group["temperature"])

    def _hessian_diagonal(self, block: Block) -> list[Tensor] | None:
        if not block.group["correction"] or not block.params:
            return None
        grads = [grad for p in block.params if (grad := p.grad) is not None]
        if any(isinstance(p, DTensor) or p.is_complex() for p in block.params):
            raise ConfigError("PSGLD: correction=True needs whole, real parameters; pass correction=False for others.")
        if not all(grad.requires_grad for grad in grads):
            raise ConfigError(
                "PSGLD: correction=True needs the gradients' graph. Call loss.backward(create_graph=True), or pass "
                "correction=False to drop the term, as is usual for alpha close to 1."
            )
        signs = [
            draw(key._replace(stream=SIGNS), where, p.device).sign().to(p.dtype)
            for (key, where), p in zip(block.draws(block.group["noise_step"]), block.params, strict=True)
        ]
        products = torch.autograd.grad(grads, block.params, signs, retain_graph=True, materialize_grads=True)
        return [sign * product for sign, product in zip(signs, products, strict=True)]

    def _update(self, block: Block, diagonal: list[Tensor] | None, std: float | Tensor) -> Tensor:
        """Move the parameters of a block; the squared norm of their noise comes back."""
        group, lr, squares = block.group, float(block.group["lr"]), []
        for j, (key, where) in enumerate(block.draws(group["noise_step"] - 1)):
            param, value, grad = block.params[j], block.values[j], block.grads[j].detach()
            state = self.state[param]
            if "square_avg" not in state:
                state["square_avg"] = torch.zeros_like(param)
            average = local(state["square_avg"])
            average.mul_(group["alpha"]).addcmul_(grad, grad, value=1 - group["alpha"])
            root = average.sqrt()
            scale = 1 / (group["eps"] + root)
            drift = scale * (grad + group["weight_decay"] * value)
            if diagonal is not None:
                gamma = (
                    (1 - group["alpha"]) * scale**2 * grad * diagonal[j] / root.clamp(min=torch.finfo(root.dtype).tiny)
                )
                drift += group["temperature"] * gamma
            value.sub_(drift, alpha=lr)
            noise = draw(key, where, value.device) * scale.sqrt() * std
            value.add_(noise)
            squares.append(noise.square().sum())
        return sum_over_shards(block.params, torch.stack(squares)).sum() if squares else torch.zeros(())
