"""ASGLD, ASG, AGLD: descent that adds noise, or takes a longer step, where the gradient may belong to a saddle.

Of the paper (Sang and Liu 2018, arXiv:1805.09416) only the abstract was available: this is an implementation
consistent with its claims, and docs/optimizers.md lists every choice that the abstract leaves open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from limbeck.errors import ConfigError
from limbeck.optim.descent import Descent, add_
from limbeck.optim.injected import is_noise
from limbeck.optim.noisy import checked_seed, evaluate
from limbeck.optim.settings import (
    NOISE_DEFAULTS,
    Gate,
    LowPrecision,
    Mode,
    NoiseScale,
    NoiseShape,
    Threshold,
    given,
)
from limbeck.optim.theory import from_constants

DESCENT_DEFAULTS: dict[str, Any] = {
    "momentum": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "reset_momentum": False,
    "maximize": False,
    "foreach": None,
}


class Langevin(Descent):
    """Gradient descent with momentum, plus the gate and the noise: the step of the whole family.

    It equals `torch.optim.SGD` bit for bit when there is no noise, no boost and no weight decay.
    """

    def __init__(self, params: Any, settings: dict[str, Any]) -> None:
        settings["seed"] = checked_seed(type(self).__name__, settings.get("seed"))
        super().__init__(params, {**NOISE_DEFAULTS, **DESCENT_DEFAULTS, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step:  x <- (1 - lr weight_decay) x - lr psi u + r phi zeta.

        Args:
          closure: None, or a function that computes the gradients anew and returns the loss.
        Returns: what the closure returned.
        Raises: ConfigError for sparse gradients, and when the gates cross and snr got no estimate.
        """
        loss = evaluate(closure)
        if self._step_shut():
            return loss
        blocks = self._gather()
        psi = [self._boost(block.group) for block in blocks]
        for block in blocks:
            self._use_masters(block)
        directions = [self._directions(block) for block in blocks]
        amounts = self._decide(blocks)
        joint = [
            self._descend(block, direction, boost, is_noise(amount))
            for block, direction, boost, amount in zip(blocks, directions, psi, amounts, strict=True)
        ]
        self._add_noise(blocks, amounts, joint)
        for block in blocks:
            self._finish(block)
        return loss

    def _step_shut(self) -> bool:
        """Take the usual step in one piece: gate clearly shut, nothing but gradient and learning rate; else False.

        It changes what the general step would, with a third of its Python, which is what small models wait for.
        """
        for group in self.param_groups:
            if group["momentum"] or group["weight_decay"] or group["maximize"] or group["step_boost"] != 1.0:
                return False
        grads = self._shut_grads()
        if grads is None:
            return False
        known = self._known_traits()
        for i, (group, found) in enumerate(zip(self.param_groups, grads, strict=True)):
            if group["foreach"] is False or known[i].is_low:
                add_(group["params"], found, -float(group["lr"]), group["foreach"])
            else:
                torch._foreach_add_(group["params"], found, alpha=-float(group["lr"]))
            group["noise_step"] += 1
        return True


class ASGLD(Langevin):
    """Adaptive stochastic gradient Langevin dynamics:  x <- x - lr psi_t u_t + r phi_t zeta_t,  E||zeta_t||^2 = 1.

    u_t is the gradient, or its momentum buffer (which the noise never enters). A step fires when S_t <= grad_threshold
    and more than `escape_steps` steps have passed since the last fire. psi_t is `step_boost` in the `boost_steps` steps
    after a fire and 1 otherwise; phi_t depends on the mode.

    Args:
      params: tensors, groups or (name, tensor) pairs. Names key the noise; without them the position does.
      lr: step size. Every setting may differ between groups and be scheduled, except gate, gate_beta, noise and
        noise_scale.
      grad_threshold: g_thres, needed by the modes gated and smooth (not by gate="snr"); "auto" is a twentieth
        of the median of S so far, over the logarithm of time (`rule.next_median`).
      noise_radius: r. None means lr * grad_threshold, so that it follows the learning rate. 0 takes a group out of the
        noise.
      escape_steps: t_thres. None means ceil((4 + 0.5 ln d) / ln 1.1).
      mode: gated (phi = 1 on a fire), smooth (max(0, 1 - (S/g_thres)^2)), annealed ((1+t)^(-anneal_power/2)),
        constant (1).
      gate: what S_t is. norm: ||g||. ema: norm of the bias-corrected gradient average. cross: an unbiased estimate of
        ||grad f|| from two half-batches (`observe_half`) or data-parallel ranks (`RankSquares`). snr: the average of
        its square over twice its standard error, with threshold 1.
      gate_beta: decay of the averages of the gates ema (unless there is momentum: then it is shared), cross and snr.
      noise: gaussian; sphere (norm exactly r); ball (uniform in the ball of radius r).
      noise_scale: energy (E||noise||^2 = r^2 over all groups), relative (the same, shared out by squared norm of each
        tensor), coordinate (each coordinate has standard deviation r).
      weight_decay: decoupled: x is multiplied by 1 - lr * weight_decay before the step.
      noise_steps: no noise and no boost from this step on; None: no end.
      reset_momentum: zero the buffer when a step fires.
      low_precision: float16 and bfloat16 parameters. stochastic: the float32 sum of parameter, descent and noise is
        rounded stochastically in the steps that add noise. master: float32 copies in the state. nearest: plain
        rounding.
      seed: keys the noise together with step, parameter and element. None draws one from torch's generator, once for
        all ranks; it lies in the groups and so in every checkpoint.
      maximize, foreach, dampening, nesterov: as in torch.optim.SGD.
    Source: Sang and Liu 2018, arXiv:1805.09416, abstract only; see docs/optimizers.md.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        grad_threshold: Threshold = None,
        noise_radius: float | None = None,
        escape_steps: int | None = None,
        mode: Mode = "gated",
        gate: Gate = "norm",
        gate_beta: float = 0.9,
        noise: NoiseShape = "gaussian",
        noise_scale: NoiseScale = "energy",
        step_boost: float = 1.0,
        boost_steps: int = 1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        anneal_power: float = 0.55,
        noise_steps: int | None = None,
        reset_momentum: bool = False,
        low_precision: LowPrecision = "stochastic",
        seed: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, given(locals()))

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
        return cls(
            params,
            lr=theory.lr,
            grad_threshold=theory.grad_threshold,
            noise_radius=theory.noise_radius,
            escape_steps=theory.escape_steps,
            **settings,
        )


class ASG(Langevin):
    """Adaptive stochastic gradient: ASGLD with r = 0, which leaves saddles by the mini-batches' own noise.

    After a fire `boost_steps` steps are `step_boost` times as long. `stats()["boosted_next"]` says so beforehand, so
    that the caller can give those steps a fresh small batch of b samples: they then have the energy of AGLD with noise
    radius step_boost * lr * sigma / sqrt(b).

    Args: as ASGLD's, without those of the noise. `step_boost=1` is `torch.optim.SGD`, bit for bit.
    Source: Sang and Liu 2018, arXiv:1805.09416, abstract only; the longer step is that of CNC-SGD (Daneshmand et al.
      2018, arXiv:1803.05999) as we understand it.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        grad_threshold: Threshold = None,
        escape_steps: int | None = None,
        gate: Gate = "norm",
        gate_beta: float = 0.9,
        step_boost: float = 10.0,
        boost_steps: int = 1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        noise_steps: int | None = None,
        reset_momentum: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        # It draws no noise, and so no seed from torch's generator either.
        super().__init__(params, {**given(locals()), "noise_radius": 0.0, "seed": 0})


class AGLD(ASGLD):
    """Adaptive gradient Langevin dynamics: ASGLD on gradients of the full objective, so that S_t is the exact norm.

    Args: as ASGLD's; the gate is "norm", the only one that full gradients need.
    Source: Sang and Liu 2018, arXiv:1805.09416, abstract only.
    """

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["gate"] != "norm":
            raise ConfigError(
                f"AGLD: gate is {group['gate']!r}; full gradients need only 'norm'. Use ASGLD for mini-batches."
            )


def count(params: list[Any]) -> int:
    """Real numbers in parameters given in any of the forms that an optimizer takes."""
    total = 0
    for item in params:
        if isinstance(item, dict):
            total += count(list(item["params"]))
        else:
            tensor = item[1] if isinstance(item, tuple) else item
            total += tensor.numel() * (2 if tensor.is_complex() else 1)
    return total
