"""ASGLD, ASG, AGLD: descent that adds noise, or takes a longer step, where the gradient says that it may be
at a saddle.

Of the paper (Sang and Liu 2018, arXiv:1805.09416) only the abstract was available: this is an implementation
consistent with its claims, and docs/optimizers.md lists every choice that the abstract leaves open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.optim.block import Block
from limbeck.optim.gates import Vector
from limbeck.optim.injection import Joint, NoisyOptimizer
from limbeck.optim.settings import (
    LOW_PRECISION,
    NOISE_DEFAULTS,
    Gate,
    LowPrecision,
    Mode,
    NoiseScale,
    NoiseShape,
    chosen,
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


class Langevin(NoisyOptimizer):
    """Gradient descent with momentum, plus the gate and the noise: the step of the whole family.

    It equals `torch.optim.SGD` bit for bit when there is no noise, no boost and no weight decay.
    """

    def __init__(self, params: Any, settings: dict[str, Any]) -> None:
        super().__init__(params, {**NOISE_DEFAULTS, **DESCENT_DEFAULTS, **settings})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
          closure: None, or a function that computes the gradients anew and returns the loss.
        Returns: what the closure returned.
        Raises: ConfigError for sparse gradients, and when the gates cross and snr got no estimate.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._step_shut():
            return loss
        blocks = self._gather()
        boosts = [self._boost(block.group) for block in blocks]
        directions = []
        for block in blocks:
            self._use_masters(block)
            directions.append(self._directions(block))
        amounts = self._decide(blocks)
        joint = []
        for block, direction, boost, amount in zip(blocks, directions, boosts, amounts, strict=True):
            is_noisy = isinstance(amount, Tensor) or amount != 0.0
            joint.append(self._descend(block, direction, boost, is_noisy))
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
        for group, found in zip(self.param_groups, grads, strict=True):
            params = group["params"]
            _add_(params, found, -float(group["lr"]), _use_foreach(group["foreach"], params))
            group["noise_step"] += 1
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that float32 masters stay float32."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, param in zip(ids, params, strict=True):
            saved = state_dict["state"].get(i, {})
            if "master" in saved:
                self.state[param]["master"] = saved["master"].detach().clone().to(param.device)

    def _prepare_group(self, group: dict[str, Any]) -> None:
        super()._prepare_group(group)
        for field in ("momentum", "weight_decay"):
            if group[field] < 0:
                raise ConfigError(f"{type(self).__name__}: {field} is {group[field]}; it must not be negative.")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ConfigError(f"{type(self).__name__}: nesterov needs a momentum and no dampening.")

    def _use_masters(self, block: Block) -> None:
        """Let the step change float32 masters in place of the low-precision parameters that have one."""
        if block.group["low_precision"] != "master":
            return
        for j, param in enumerate(block.params):
            if param.dtype in LOW_PRECISION:
                state = self.state[param]
                if "master" not in state:
                    state["master"] = param.detach().float()
                block.values[j] = local(state["master"])

    def _directions(self, block: Block) -> list[Tensor]:
        """u_t: the gradient, or its momentum buffer, which only gradients enter."""
        group = block.group
        grads = torch._foreach_neg(block.grads) if group["maximize"] and block.grads else block.grads
        if group["momentum"] == 0 or not block.params:
            return grads if isinstance(grads, list) else list(grads)
        buffers, old, fresh = [], [], []
        for param, grad in zip(block.params, grads, strict=True):
            state = self.state[param]
            if "momentum_buffer" in state:
                old.append(local(state["momentum_buffer"]))
                fresh.append(grad)
            else:
                # The first buffer is the gradient itself, undampened, as in torch.optim.SGD.
                assert param.grad is not None
                state["momentum_buffer"] = param.grad.detach().clone()
                local(state["momentum_buffer"]).copy_(grad)
            buffers.append(local(state["momentum_buffer"]))
        if old:
            use_foreach = _use_foreach(group["foreach"], old)
            _scale_(old, group["momentum"], use_foreach)
            _add_(old, fresh, 1 - group["dampening"], use_foreach)
        return list(torch._foreach_add(grads, buffers, alpha=group["momentum"])) if group["nesterov"] else buffers

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
        if values:
            use_foreach = _use_foreach(group["foreach"], values)
            _scale_(values, decay, use_foreach)
            _add_(values, pushes, -rate, use_foreach)
        return Joint(directions, rate, decay) if is_joint else None

    def _finish(self, block: Block) -> None:
        group = block.group
        if group["reset_momentum"] and group["momentum"] != 0:
            keep = (group["last_fire"] != group["noise_step"] - 1) * 1.0
            for param in block.params:
                local(self.state[param]["momentum_buffer"]).mul_(keep)
        if group["low_precision"] == "master":
            for param, value in zip(block.params, block.values, strict=True):
                if param.dtype in LOW_PRECISION:
                    local(param.detach()).copy_(value)

    def _averages(self, blocks: list[Block]) -> list[Vector]:
        """The momentum buffers, bias-corrected, where there are any: no second buffer is kept."""
        if any(b.group["momentum"] == 0 or b.group["dampening"] != 0 for b in blocks):
            return super()._averages(blocks)
        vectors = []
        for block in blocks:
            beta, steps = block.group["momentum"], block.group["noise_step"] + 1
            buffers = [local(self.state[p]["momentum_buffer"]) for p in block.params]
            vectors.append(Vector(block.params, buffers, (1 - beta) / (1 - beta**steps)))
        return vectors


class ASGLD(Langevin):
    """Adaptive stochastic gradient Langevin dynamics:  x <- x - lr psi_t u_t + r phi_t zeta_t,  E||zeta||^2 =
    1.

    u_t is the gradient, or its momentum buffer (which the noise never enters). A step fires when S_t <=
    grad_threshold and more than `escape_steps` steps have passed since the last fire. psi_t is `step_boost`
    in the `boost_steps` steps after a fire and 1 otherwise; phi_t depends on the mode.

    Args:
      params: tensors, groups or (name, tensor) pairs. Names key the noise; without them the position does.
      lr: step size. Every setting may differ between groups and be scheduled, except gate, gate_beta, noise
        and noise_scale.
      grad_threshold: g_thres, needed by the modes gated and smooth (not by gate="snr"); "auto" is 0.1 x
        running median of S.
      noise_radius: r. None means lr * grad_threshold, so that it follows the learning rate. 0 takes a group
        out of the noise.
      escape_steps: t_thres. None means ceil((4 + 0.5 ln d) / ln 1.1).
      mode: gated (phi = 1 on a fire), smooth (max(0, 1 - (S/g_thres)^2)), annealed ((1+t)^(-anneal_power/2)),
        constant (1).
      gate: what S_t is. norm: ||g||. ema: norm of the bias-corrected gradient average. cross: an unbiased
        estimate of ||grad f|| from two half-batches (`observe_half`) or data-parallel ranks (`RankSquares`).
        snr: the average of its square over twice its standard error, with threshold 1.
      gate_beta: decay of the averages of the gates ema (unless there is momentum: then it is shared), cross
        and snr.
      noise: gaussian; sphere (norm exactly r); ball (uniform in the ball of radius r).
      noise_scale: energy (E||noise||^2 = r^2 over all groups), relative (the same, shared out by squared norm
        of each tensor), coordinate (each coordinate has standard deviation r).
      weight_decay: decoupled: x is multiplied by 1 - lr * weight_decay before the step.
      noise_steps: no noise and no boost from this step on; None: no end.
      reset_momentum: zero the buffer when a step fires.
      low_precision: float16 and bfloat16 parameters. stochastic: the float32 sum of parameter, descent and
        noise is rounded stochastically in the steps that add noise. master: float32 copies in the state.
        nearest: plain rounding.
      seed: the same on every rank; keys the noise together with step, parameter and element.
      maximize, foreach, dampening, nesterov: as in torch.optim.SGD.
    Source: Sang and Liu 2018, arXiv:1805.09416, abstract only; see docs/optimizers.md.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        grad_threshold: float | Literal["auto"] | None = None,
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
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, chosen(locals()))

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

    After a fire `boost_steps` steps are `step_boost` times as long. `stats()["boosted_next"]` says so
    beforehand, so that
    the caller can give those steps a fresh small batch of b samples: they then have the energy of AGLD with
      noise radius
    step_boost * lr * sigma / sqrt(b).

    Args: as ASGLD's, without those of the noise. `step_boost=1` is `torch.optim.SGD`, bit for bit.
    Source: Sang and Liu 2018, arXiv:1805.09416, abstract only; the longer step is that of CNC-SGD (Daneshmand
      et al. 2018, arXiv:1803.05999) as we understand it.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        grad_threshold: float | Literal["auto"] | None = None,
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
        settings = chosen(locals())
        super().__init__(params, {**settings, "noise_radius": 0.0})


class AGLD(ASGLD):
    """Adaptive gradient Langevin dynamics: ASGLD on gradients of the full objective, so that S_t is the exact
    norm.

    Args: as ASGLD's; the gate is "norm", the only one that full gradients need.
    Source: Sang and Liu 2018, arXiv:1805.09416, abstract only.
    """

    def _prepare_group(self, group: dict[str, Any]) -> None:
        super()._prepare_group(group)
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


def _use_foreach(asked: bool | None, tensors: list[Tensor]) -> bool:
    if asked is not None:
        return asked
    # torch's multi-tensor product rounds a factor to the tensors' own type, so that low precision on the CPU needs the
    # loop, as torch.optim.SGD chooses there.
    return tensors[0].device.type != "cpu" or tensors[0].dtype not in LOW_PRECISION


def _scale_(tensors: list[Tensor], factor: float, use_foreach: bool) -> None:
    if factor == 1.0:
        return
    if use_foreach:
        torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


def _add_(tensors: list[Tensor], others: list[Tensor], alpha: float | Tensor, use_foreach: bool) -> None:
    if isinstance(alpha, Tensor):
        torch._foreach_add_(tensors, torch._foreach_mul(others, alpha))
    elif use_foreach:
        torch._foreach_add_(tensors, others, alpha=alpha)
    else:
        for tensor, other in zip(tensors, others, strict=True):
            tensor.add_(other, alpha=alpha)
