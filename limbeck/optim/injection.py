"""The gate and the noise, for any optimizer: the common part of the Langevin family and of `Perturb`.

A step of it is: the descent (the subclass's own), then `_measure` (how stationary), `_decide` (how much noise
a group gets, and whether the gate fired), `_add_noise`. Every hyperparameter and counter lies in
`param_groups` as a plain number, so that checkpoints of any kind carry them and schedulers can reach them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from limbeck.errors import ConfigError
from limbeck.optim import gates
from limbeck.optim.block import Block, Traits, gather, plain_grads
from limbeck.optim.noise import add_noise_
from limbeck.optim.settings import AUTO_FRACTION, COUNTERS, LOW_PRECISION, NOISE_DEFAULTS, WHOLE, check_group
from limbeck.optim.settings import Gate as Gate
from limbeck.optim.settings import NoiseScale as NoiseScale
from limbeck.optim.sharding import local, sum_over_shards
from limbeck.optim.spread import plain, shape_factor, unit_stds
from limbeck.optim.theory import escape_window


class NoisyOptimizer(Optimizer):
    """An optimizer with a gate and noise; a subclass writes `step` out of the parts below."""

    _needs_radius = True
    """Whether modes without a gate need `noise_radius`; False where the subclass has its own measure of noise."""
    _half: list[Tensor] | None = None
    _observed = False
    _statistic: float | Tensor = math.inf
    _noise_square: float | Tensor = 0.0
    _warned = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it starts at the step that the others have reached.

        Raises: ConfigError for hyperparameters that cannot work, or that must agree with the other groups'
          and do not.
        """
        super().add_param_group(param_group)
        self._prepare_group(self.param_groups[-1])

    def stats(self) -> dict[str, Tensor]:
        """What the last step measured and did; reading it is up to the caller, nothing is synchronised here.

        Returns: `statistic` (S; a lower bound while the gate is clearly shut, inf when it was not measured), `fires`
          (so far), `steps_since_fire` (inf before the first), `noise_norm` (of the noise added by the last step that
          drew any), `boosted_next` (whether the next step is a boosted one); for the group with the most fires.
        """
        group = self.param_groups[0]
        if self._on_host():
            group = max(self.param_groups, key=lambda group: int(group["fires"]))
        since = torch.as_tensor(group["noise_step"] - 1 - group["last_fire"], dtype=torch.float64)
        return {
            "statistic": torch.as_tensor(self._statistic),
            "fires": torch.as_tensor(group["fires"]),
            "steps_since_fire": torch.where(torch.as_tensor(group["fires"]) > 0, since, math.inf),
            "noise_norm": torch.as_tensor(self._noise_square).sqrt(),
            "boosted_next": torch.as_tensor(self._boost(group) != 1.0),
        }

    def observe(self, square: float | Tensor) -> None:
        """Tell the gates cross and snr an unbiased estimate of ||grad f||^2, once before each step."""
        value = torch.as_tensor(square, dtype=torch.float64)
        estimate: float | Tensor = value if value.device.type != "cpu" else float(value)
        first = self.param_groups[0]
        beta = first["gate_beta"]
        averages = {
            "gate_weight": beta * first["gate_weight"] + (1 - beta),
            "gate_mean": beta * first["gate_mean"] + (1 - beta) * estimate,
            "gate_square": beta * first["gate_square"] + (1 - beta) * estimate**2,
        }
        for group in self.param_groups:
            group.update(averages)
        self._observed = True

    @torch.no_grad()
    def observe_half(self, scale: float = 1.0) -> None:
        """Call after the backward pass of the first half-batch, and again after that of the second; clip then.

        The halves' losses are each divided by 2, as gradient accumulation does.

        Args:
          scale: GradScaler's scale while the gradients are still multiplied by it.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self._half is None:
            self._half = [p.grad.detach().clone() for p in params]
            return
        if len(params) != len(self._half):
            raise ConfigError(
                "observe_half: the two half-batches gave gradients to different parameters; use gate='norm'."
            )
        self.observe(gates.cross_product(params, self._half) / scale**2)
        self._half = None

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with every counter as a plain number."""
        return with_plain_counters(super().state_dict())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in COUNTERS.items():
                group.setdefault(name, value)

    def _radius(self, group: dict[str, Any]) -> float:
        """r of this step, before the gate; a coordinate's standard deviation when noise_scale is "coordinate"."""
        if group["noise_radius"] is not None:
            return float(group["noise_radius"])
        return float(group["lr"]) * self._threshold(group)

    def _averages(self, blocks: list[Block]) -> list[gates.Vector]:
        """Bias-corrected averages of the gradient, for the gate "ema"; updates them."""
        vectors = []
        for block in blocks:
            beta, states = block.group["gate_beta"], [self.state[p] for p in block.params]
            for state, param in zip(states, block.params, strict=True):
                if "gradient_ema" not in state:
                    state["gradient_ema"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                    state["gradient_ema_steps"] = 0
                state["gradient_ema_steps"] += 1
            averages = [local(state["gradient_ema"]) for state in states]
            torch._foreach_lerp_(averages, block.grads, 1 - beta)
            vectors += [
                gates.Vector([param], [average], 1 / (1 - beta ** state["gradient_ema_steps"]))
                for param, average, state in zip(block.params, averages, states, strict=True)
            ]
        return vectors

    def _gather(self) -> list[Block]:
        return gather(self.param_groups, self._known_traits())

    def _known_traits(self) -> dict[int, Traits]:
        # Not an attribute from __init__, because deepcopy and unpickling do not call it.
        return self.__dict__.setdefault("_traits", {})

    def _boost(self, group: dict[str, Any]) -> float | Tensor:
        """psi of the coming step."""
        boost = group["step_boost"]
        if boost == 1.0:
            return 1.0
        since = group["noise_step"] - group["last_fire"]
        boosted = (since > 0) & (since <= group["boost_steps"])
        if isinstance(boosted, Tensor):
            return torch.where(boosted, boost, 1.0)
        return float(boost) if boosted else 1.0

    def _decide(self, blocks: list[Block]) -> list[float | Tensor]:
        """Measure, fire, count the step; the noise radius r * phi of each block comes back."""
        numel = sum(block.numel for block in blocks if not self._is_quiet(block.group))
        numel = numel or sum(block.numel for block in blocks)
        asking = [block for block in blocks if block.params and self._asks(block.group, numel)]
        self._statistic = self._measure(blocks, asking) if asking else math.inf
        self._observed = False
        amounts = [self._amount(block.group, block in asking, numel) for block in blocks]
        for block in blocks:
            block.group["noise_step"] += 1
        return amounts

    def _shut_grads(self) -> list[list[Tensor]] | None:
        """The gradients of every group if a first piece of them passes every threshold: the usual case, found quickly.

        Returns: None if the gate may open, or asks for more than this rank's whole, dense gradients.
        """
        limit = 0.0
        for group in self.param_groups:
            threshold = group["grad_threshold"]
            if group["gate"] != "norm" or group["mode"] not in ("gated", "smooth") or not isinstance(threshold, float):
                return None
            limit = max(limit, threshold)
        known, grads = self._known_traits(), []
        for i, group in enumerate(self.param_groups):
            found = plain_grads(i, group["params"], known)
            if found is None:
                return None
            grads.append(found)
        ceiling = (limit * (1 + gates.MARGIN)) ** 2
        square = gates.head_square(grads[0][0], ceiling)
        if not square > ceiling:
            return None
        self._statistic = math.sqrt(square)
        return grads

    def _amount(self, group: dict[str, Any], asks: bool, numel: int) -> float | Tensor:
        step = group["noise_step"]
        if group["mode"] in ("annealed", "constant"):
            fade = 1.0 if group["mode"] == "constant" else (1 + step) ** (-group["anneal_power"] / 2)
            return self._radius(group) * fade if self._is_on(group) else 0.0
        if not asks:
            return 0.0
        threshold = self._threshold(group)
        if isinstance(self._statistic, float) and not self._statistic <= threshold:
            return 0.0
        fired = (self._statistic <= threshold) & (step - group["last_fire"] > self._escape_steps(group, numel))
        group["last_fire"] = group["last_fire"] + fired * (step - group["last_fire"])
        group["fires"] = group["fires"] + fired * 1
        if self._is_quiet(group):
            return 0.0
        return self._radius(group) * (fired * 1.0 if group["mode"] == "gated" else _smooth(self._statistic, threshold))

    def _asks(self, group: dict[str, Any], numel: int) -> bool:
        """Whether the group wants to know S at this step."""
        if group["mode"] not in ("gated", "smooth") or not self._is_on(group):
            return False
        if self._is_quiet(group) and group["step_boost"] == 1.0:
            return False
        if group["mode"] == "smooth" or group["grad_threshold"] == "auto" or group["gate"] == "ema":
            # Running values must see every step.
            return True
        since = group["noise_step"] - group["last_fire"]
        return isinstance(since, Tensor) or since > self._escape_steps(group, numel)

    def _measure(self, blocks: list[Block], asking: list[Block]) -> float | Tensor:
        first = self.param_groups[0]
        if first["gate"] in ("cross", "snr"):
            return self._observation(first)
        automatic = "auto" in [block.group["grad_threshold"] for block in asking]
        limit = math.inf if automatic else max([self._threshold(block.group) for block in asking])
        blocks = [block for block in blocks if block.params]
        is_plain = all(block.traits.is_plain for block in blocks)
        if first["gate"] == "norm":
            vectors = [gates.Vector(block.params, block.grads) for block in blocks]
        else:
            vectors = self._averages(blocks)
        statistic = gates.vector_norm(vectors, limit, is_plain)
        if automatic:
            median = gates.next_median(first["gate_median"], statistic)
            for group in self.param_groups:
                group["gate_median"] = median
        return statistic

    def _observation(self, first: dict[str, Any]) -> float | Tensor:
        if not self._observed:
            raise ConfigError(
                f"gate={first['gate']!r} got no estimate since the last step. Call observe_half() after each of two "
                "half-batches' backward passes, or observe(), before step()."
            )
        if first["gate"] == "cross":
            value = gates.observed_norm(first["gate_mean"], first["gate_weight"])
        else:
            value = gates.observed_snr(
                first["gate_mean"], first["gate_square"], first["gate_weight"], first["gate_beta"]
            )
        return value if value.device.type != "cpu" else float(value)

    def _threshold(self, group: dict[str, Any]) -> Any:
        if group["gate"] == "snr":
            return 1.0
        if group["grad_threshold"] == "auto":
            return AUTO_FRACTION * group["gate_median"]
        return float(group["grad_threshold"])

    def _escape_steps(self, group: dict[str, Any], numel: int) -> int:
        return escape_window(numel) if group["escape_steps"] is None else int(group["escape_steps"])

    def _is_quiet(self, group: dict[str, Any]) -> bool:
        """Whether the group is outside the noise domain."""
        return group["noise_radius"] == 0 or float(group["lr"]) == 0

    def _is_on(self, group: dict[str, Any]) -> bool:
        # A learning rate of 0 freezes a group. torch's distributed checkpoints rely on it: they take such a step, with
        # zero gradients, to make an optimizer create its state.
        if float(group["lr"]) == 0:
            return False
        return group["noise_steps"] is None or group["noise_step"] < group["noise_steps"]

    def _on_host(self) -> bool:
        return all(not isinstance(group["fires"], Tensor) for group in self.param_groups)

    def _add_noise(
        self,
        blocks: list[Block],
        amounts: Sequence[float | Tensor],
        joint: Sequence[Joint | None] | None = None,
    ) -> None:
        """Add noise of radius `amounts[i]` to block i; a Joint descent is done in the same float32 sum."""
        noisy = [
            i for i, amount in enumerate(amounts) if blocks[i].params and (isinstance(amount, Tensor) or amount != 0.0)
        ]
        if not noisy:
            return
        self._warn_if_lost(blocks, amounts)
        first = self.param_groups[0]
        domain = [block for block in blocks if block.params and not self._is_quiet(block.group)]
        stds = unit_stds(domain, first["noise_scale"])
        draws = {id(block): block.draws(first["noise_step"] - 1) for block in domain}
        factor = shape_factor(domain, first["noise"], stds, draws)
        params, squares = [], []
        for i in noisy:
            block, descent = blocks[i], joint[i] if joint else None
            for j, (key, where) in enumerate(draws[id(block)]):
                value, std = block.values[j], amounts[i] * (stds[id(block)][j] * factor)
                extra = descent.of(j) if descent and value.dtype in LOW_PRECISION else {}
                stochastic = value.dtype in LOW_PRECISION and block.group["low_precision"] == "stochastic"
                squares.append(add_noise_(value, key, where, std, stochastic=stochastic, **extra))
                params.append(block.params[j])
        self._noise_square = _total(params, squares)

    def _warn_if_lost(self, blocks: list[Block], amounts: Sequence[float | Tensor]) -> None:
        low = [v for b in blocks for v in b.values if v.dtype in LOW_PRECISION and b.group["low_precision"] != "master"]
        if self._warned or not low:
            return
        self._warned = True
        numel = sum(block.numel for block in blocks)
        rms = math.sqrt(float(gates.exact_squares(low).sum()) / max(1, sum(v.numel() for v in low)))
        step = rms * torch.finfo(low[0].dtype).eps
        spread = 1.0 if blocks[0].group["noise_scale"] == "coordinate" else math.sqrt(numel)
        std = max(float(amount) for amount in amounts) / spread
        if 0 < std < step / 4:
            warnings.warn(
                f"{type(self).__name__}: the noise's standard deviation {std:.1e} is below a quarter of the rounding "
                f"step {step:.1e} of {low[0].dtype} parameters, so rounding drowns it; use float32 parameters or "
                "low_precision='master'.",
                stacklevel=4,
            )

    def _prepare_group(self, group: dict[str, Any]) -> None:
        for name, value in {**NOISE_DEFAULTS, **COUNTERS}.items():
            group.setdefault(name, value)
        first = self.param_groups[0]
        group["noise_step"] = first["noise_step"]
        for name in WHOLE:
            if group[name] != first[name]:
                raise ConfigError(
                    f"{name} is {group[name]!r} in one group and {first[name]!r} in another; it must be the same."
                )
        check_group(type(self).__name__, group, self._needs_radius)


@dataclass(frozen=True, slots=True)
class Joint:
    """The descent of a block whose low-precision parameters are summed with their noise in float32 and rounded once."""

    directions: list[Tensor]
    lr: float | Tensor
    decay: float

    def of(self, index: int) -> dict[str, Any]:
        """The arguments of `add_noise_` for one parameter."""
        return {"direction": self.directions[index], "lr": self.lr, "decay": self.decay}


def with_plain_counters(state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` with the counters that an accelerator holds as scalars turned into numbers, in place."""
    for group in state_dict["param_groups"]:
        for name in COUNTERS:
            if isinstance(group[name], Tensor):
                group[name] = group[name].item()
    return state_dict


def _smooth(statistic: float | Tensor, threshold: float | Tensor) -> float | Tensor:
    if isinstance(statistic, Tensor):
        return (1 - (statistic / threshold) ** 2).clamp(min=0).nan_to_num(1.0)
    if statistic <= 0 or threshold <= 0:
        return float(statistic <= 0)
    return max(0.0, 1 - (statistic / threshold) ** 2)


def _total(params: list[Tensor], squares: list[float | Tensor]) -> float | Tensor:
    values = torch.stack([torch.as_tensor(square, dtype=torch.float32) for square in squares])
    return plain(sum_over_shards(params, values).sum())
