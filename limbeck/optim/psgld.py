"""Preconditioned SGLD (Li, Chen, Carlson, Carin 2016), whose preconditioner settles before samples count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from limbeck.errors import ConfigError
from limbeck.optim.block import Block
from limbeck.optim.noise import SIGNS, draw, square_norm
from limbeck.optim.sampler import Sampler
from limbeck.optim.settings import LowPrecision, given, number
from limbeck.optim.sharding import local


class PSGLD(Sampler):
    """Preconditioned SGLD:  x <- x - lr G (g + weight_decay x) + lr T Gamma + sqrt(2 lr T G) xi.

    G = 1 / (eps + sqrt(V)), and V is the bias-corrected running average of g^2 in the first `adapt_steps` steps that a
    parameter has a gradient. From then on V stays: with a G that no longer moves, the stationary distribution is
    exp(-f / T), as SGLD's. While V moves it is another one, since V remembers the path: on f = x^2 / 2 with T = 0.3,
    lr = 0.002, alpha = 0.99 and eps = 0.1 the variance has a bias of almost one half, with Gamma or without. Let
    samples count after `adapt_steps`.

    Args:
      params, lr, temperature, weight_decay, noise_steps, low_precision, seed, maximize: as in SGLD.
      alpha: decay of V.
      eps: floor of sqrt(V).
      adapt_steps: steps in which V follows the gradients; None: always, which is the paper's method with its bias.
      correction: keep Gamma_i = dG_i / dx_i = -(1 - alpha) G_i^2 g_i H_ii / sqrt(V_i) while V moves, with the Hessian
        diagonal estimated by v_i (H v)_i with random signs v; the gradients must then come from
        `loss.backward(create_graph=True)`. It is the derivative through the newest gradient only, and does not remove
        the bias.
    Source: Li, Chen, Carlson, Carin 2016, arXiv:1512.07666, with lr = e n / 2 and T = 1 / n. They drop Gamma and never
      stop adapting, and V is not bias-corrected.
    """

    _state_names = ("square_avg",)

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        temperature: float,
        alpha: float = 0.99,
        eps: float = 1e-5,
        adapt_steps: int | None = 1000,
        correction: bool = False,
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
        square_avg, slope = states[0], states[1:]
        lr, temperature = float(settings["lr"]), float(settings["temperature"])
        root = (square_avg / settings["square_avg_weight"]).sqrt()
        scale = 1 / (settings["eps"] + root)
        drift = scale * (grad + settings["weight_decay"] * x)
        if slope:
            drift += temperature * scale**2 * slope[0] / root.clamp(min=torch.finfo(root.dtype).tiny)
        x.sub_(drift, alpha=lr)
        if noise is None:
            return 0.0
        added = noise * scale.sqrt() * math.sqrt(2 * lr * temperature)
        x.add_(added)
        return square_norm(added.float(), 1.0)

    def _make_state(self, block: Block) -> None:
        super()._make_state(block)
        for param in block.params:
            # There from the first step on, or a flattened checkpoint would not know where to put them.
            self.state[param].setdefault("square_avg_weight", 0.0)
            self.state[param].setdefault("square_avg_steps", 0)

    def _prepare(self, block: Block, names: list[str]) -> list[list[Tensor]]:
        """Let V follow the gradients;  the correction's g_i H_ii (1 - alpha) comes back."""
        group, adapting = block.group, []
        for j, param in enumerate(block.params):
            state = self.state[param]
            if group["adapt_steps"] is None or state["square_avg_steps"] < group["adapt_steps"]:
                grad = self._gradient(block, j)
                local(state["square_avg"]).mul_(group["alpha"]).addcmul_(grad, grad, value=1 - group["alpha"])
                state["square_avg_weight"] = group["alpha"] * state["square_avg_weight"] + 1 - group["alpha"]
                state["square_avg_steps"] += 1
                adapting.append(j)
        slopes: list[list[Tensor]] = [[] for _ in block.params]
        if group["correction"] and adapting:
            diagonal = self._hessian_diagonal(block, names)
            for j in adapting:
                share = (1 - group["alpha"]) / self.state[block.params[j]]["square_avg_weight"]
                slopes[j] = [share * self._gradient(block, j) * diagonal[j]]
        return slopes

    def _hessian_diagonal(self, block: Block, names: list[str]) -> list[Tensor]:
        if any(isinstance(p, DTensor) or p.is_complex() for p in block.params):
            raise ConfigError("PSGLD: correction=True needs whole, real parameters; pass correction=False for others.")
        grads = [grad for p in block.params if (grad := p.grad) is not None]
        if not all(grad.requires_grad for grad in grads):
            raise ConfigError(
                "PSGLD: correction=True needs the gradients' graph. Call loss.backward(create_graph=True), or pass "
                "correction=False to drop the term."
            )
        signs = [
            draw(key._replace(stream=SIGNS), where, p.device).sign().to(p.dtype)
            for (key, where), p in zip(block.draws(block.group["noise_step"], names), block.params, strict=True)
        ]
        with torch.enable_grad():
            products = torch.autograd.grad(grads, block.params, signs, retain_graph=True, materialize_grads=True)
        return [
            (sign * product).detach().to(value.dtype)
            for sign, product, value in zip(signs, products, block.values, strict=True)
        ]

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not 0 <= number("PSGLD", "alpha", group["alpha"]) < 1:
            raise ConfigError(f"PSGLD: alpha is {group['alpha']}; it lies in [0, 1).")
        if not number("PSGLD", "eps", group["eps"]) > 0:
            raise ConfigError(f"PSGLD: eps is {group['eps']}; without a floor a gradient of 0 makes an infinite step.")
        if group["adapt_steps"] == 0:
            raise ConfigError("PSGLD: adapt_steps is 0; V needs one gradient at least.")
