"""ASGLD, ASG, AGLD: descent that adds noise, or takes a longer step, where the gradient may belong to a saddle.

Of the paper (Sang and Liu 2018, arXiv:1805.09416) only the abstract was available: this is an implementation
consistent with its claims, and docs/optimizers.md lists every choice that the abstract leaves open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.optim.block import Block
from limbeck.optim.gated import GatedOptimizer, Joint, is_noise
from limbeck.optim.gates import Vector
from limbeck.optim.noisy import checked_seed, evaluate
from limbeck.optim.settings import (
    LOW_PRECISION,
    NOISE_DEFAULTS,
    Gate,
    LowPrecision,
    Mode,
    NoiseScale,
    NoiseShape,
    Threshold,
)
from limbeck.optim.sharding import local
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


class Langevin(GatedOptimizer):
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
                _add_(group["params"], found, -float(group["lr"]), group["foreach"])
            else:
                torch._foreach_add_(group["params"], found, alpha=-float(group["lr"]))
            group["noise_step"] += 1
        return True

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ConfigError(f"{type(self).__name__}: nesterov needs a momentum and no dampening.")

    def _directions(self, block: Block) -> list[Tensor]:
        """u_t: the gradient, or its momentum buffer, which only gradients enter."""
        group = block.group
        grads = torch._foreach_neg(block.grads) if group["maximize"] and block.grads else block.grads
        if group["momentum"] == 0 or not block.params:
            return list(grads)
        buffers, old, fresh = [], [], []
        for param, grad in zip(block.params, grads, strict=True):
            state = self.state[param]
            was_there = self._has_buffer(state, group)
            if was_there:
                old.append(local(state["momentum_buffer"]))
                fresh.append(grad)
            else:
                # The first buffer is the gradient itself, undampened, as in torch.optim.SGD.
                assert param.grad is not None
                state["momentum_buffer"] = param.grad.detach().clone()
                local(state["momentum_buffer"]).copy_(grad)
            if group["gate"] == "ema":
                self._weigh(state, group, grad, was_there)
            buffers.append(local(state["momentum_buffer"]))
        _scale_(old, group["momentum"], group["foreach"])
        _add_(old, fresh, 1 - group["dampening"], group["foreach"])
        return list(torch._foreach_add(grads, buffers, alpha=group["momentum"])) if group["nesterov"] else buffers

    def _weigh(self, state: dict[str, Any], group: dict[str, Any], grad: Tensor, was_there: bool) -> None:
        """Note how many gradients a momentum buffer holds, for the gate "ema"."""
        # A buffer without a note is another optimizer's, or of an older version: it has run for long.
        before = state.get("momentum_weight", 1 / (1 - group["momentum"]) if was_there else 0.0)
        # Where nothing is stepped, a gradient of zeros is the one by which a checkpoint makes this state.
        counts = not self._is_frozen() or bool(grad.any())
        state["momentum_weight"] = group["momentum"] * before + 1.0 if counts else before

    def _has_buffer(self, state: dict[str, Any], group: dict[str, Any]) -> bool:
        if "momentum_buffer" not in state:
            return False
        # A distributed checkpoint makes buffers of zeros before the first step, which must not dampen it.
        is_first = group["dampening"] != 0 and group["noise_step"] == 0
        return not is_first or bool(local(state["momentum_buffer"]).any())

    def _descend(self, block: Block, directions: list[Tensor], boost: float | Tensor, is_noisy: bool) -> Joint | None:
        """x <- (1 - lr weight_decay) x - lr psi u, or a Joint of what is summed with its noise first."""
        group = block.group
        lr = float(group["lr"])
        decay = 1 - lr * group["weight_decay"]
        rate = lr * boost
        values, pushes = block.values, directions
        is_joint = is_noisy and group["low_precision"] == "stochastic" and any(v.dtype in LOW_PRECISION for v in values)
        if is_joint:
            kept = [j for j, value in enumerate(block.values) if value.dtype not in LOW_PRECISION]
            values, pushes = [block.values[j] for j in kept], [directions[j] for j in kept]
        _scale_(values, decay, group["foreach"])
        _add_(values, pushes, -rate, group["foreach"])
        return Joint(directions, rate, decay) if is_joint else None

    def _finish(self, block: Block) -> None:
        group = block.group
        if group["reset_momentum"] and group["momentum"] != 0 and float(group["lr"]) != 0:
            keep = (group["last_fire"] != group["noise_step"] - 1) * 1.0
            for param in block.params:
                state = self.state[param]
                local(state["momentum_buffer"]).mul_(keep)
                if "momentum_weight" in state:
                    state["momentum_weight"] = state["momentum_weight"] * keep
        self._round_masters(block)

    def _averages(self, blocks: list[Block]) -> list[Vector]:
        """The momentum buffers, bias-corrected, where there are any: no second buffer is kept."""
        if any(b.group["momentum"] == 0 or b.group["dampening"] != 0 for b in blocks):
            return super()._averages(blocks)
        return [
            Vector([param], [local(state["momentum_buffer"])], 1 / state["momentum_weight"])
            for block in blocks
            for param in block.params
            for state in [self.state[param]]
        ]


class ASGLD(Langevin):
    """Adaptive stochastic gradient Langevin dynamics:  x <- x - lr psi_t u_t + r phi_t zeta_t,  E||zeta_t||^2 = 1.

    u_t is the gradient, or its momentum buffer (which the noise never enters). A step fires when S_t <= grad_threshold
    and more than `escape_steps` steps have passed since the last fire. psi_t is `step_boost` in the `boost_steps` steps
    after a fire and 1 otherwise; phi_t depends on the mode.

    Args:
      params: tensors, groups or (name, tensor) pairs. Names key the noise; without them the position does.
      lr: step size. Every setting may differ between groups and be scheduled, except gate, gate_beta, noise and
        noise_scale.
      grad_threshold: g_thres, needed by the modes gated and smooth (not by gate="snr"); "auto" is a tenth of the
        median of S over the run so far (`rule.next_median`).
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
        settings = {
            "lr": lr,
            "grad_threshold": grad_threshold,
            "noise_radius": noise_radius,
            "escape_steps": escape_steps,
            "mode": mode,
            "gate": gate,
            "gate_beta": gate_beta,
            "noise": noise,
            "noise_scale": noise_scale,
            "step_boost": step_boost,
            "boost_steps": boost_steps,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "anneal_power": anneal_power,
            "noise_steps": noise_steps,
            "reset_momentum": reset_momentum,
            "low_precision": low_precision,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, settings)

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
        settings = {
            "lr": lr,
            "grad_threshold": grad_threshold,
            "escape_steps": escape_steps,
            "gate": gate,
            "gate_beta": gate_beta,
            "step_boost": step_boost,
            "boost_steps": boost_steps,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "noise_steps": noise_steps,
            "reset_momentum": reset_momentum,
            "maximize": maximize,
            "foreach": foreach,
            "noise_radius": 0.0,
            # It draws no noise, and so no seed from torch's generator either.
            "seed": 0,
        }
        super().__init__(params, settings)


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


def _scale_(tensors: list[Tensor], factor: float, foreach: bool | None) -> None:
    if factor == 1.0:
        return
    (together,), (alone,) = _parted(foreach, tensors)
    if together:
        torch._foreach_mul_(together, factor)
    for tensor in alone:
        tensor.mul_(factor)


def _add_(tensors: list[Tensor], others: list[Tensor], alpha: float | Tensor, foreach: bool | None) -> None:
    if isinstance(alpha, Tensor):
        if tensors:
            torch._foreach_add_(tensors, torch._foreach_mul(others, alpha))
        return
    together, alone = _parted(foreach, tensors, others)
    if together[0]:
        torch._foreach_add_(*together, alpha=alpha)
    for tensor, other in zip(*alone, strict=True):
        tensor.add_(other, alpha=alpha)


def _parted(foreach: bool | None, *lists: list[Tensor]) -> tuple[Sequence[list[Tensor]], Sequence[list[Tensor]]]:
    """What is stepped in one call, and what tensor by tensor; each as many lists as were given."""
    nothing: list[list[Tensor]] = [[] for _ in lists]
    if foreach is None and not {tensor.dtype for tensor in lists[0]}.isdisjoint(LOW_PRECISION):
        # torch's multi-tensor product rounds a factor to the tensors' own type, so that low precision on the CPU needs
        # the loop, as torch.optim.SGD chooses there.
        is_alone = [tensor.device.type == "cpu" and tensor.dtype in LOW_PRECISION for tensor in lists[0]]
        together = [[t for t, alone in zip(tensors, is_alone, strict=True) if not alone] for tensors in lists]
        return together, [[t for t, alone in zip(tensors, is_alone, strict=True) if alone] for tensors in lists]
    return (nothing, lists) if foreach is False else (lists, nothing)
