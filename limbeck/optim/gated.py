"""The gate and the noise, for any optimizer: the common part of the Langevin family and of `Perturb`.

A step of it is: the descent (the subclass's own), then `_decide` (how stationary, did the gate fire, how much noise a
group gets), `_add_noise`.
"""

from __future__ import annotations

import math
import warnings
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.optim import gates, rule
from limbeck.optim.block import Block, members, plain_grads, total_numel
from limbeck.optim.injected import InjectingOptimizer
from limbeck.optim.settings import LOW_PRECISION, WITH_GATE, check_gate
from limbeck.optim.sharding import local
from limbeck.optim.theory import escape_window

Half = list[tuple[Tensor, Tensor]]
"""Parameters, and their gradients after the first half-batch."""


class GatedOptimizer(InjectingOptimizer):
    """An optimizer with a gate and noise; a subclass writes `step` out of the parts below."""

    _counters: tuple[str, ...] = (
        "noise_step",
        "last_fire",
        "fires",
        "gate_weight",
        "gate_mean",
        "gate_square",
        "gate_median",
        "gate_median_weight",
    )
    _transient = ("_half", "_pending")
    _half: Half | None = None
    _pending: float | Tensor | None = None
    """The estimate that `observe` was told since the last step."""
    _statistic: float | Tensor = math.inf
    _told_no_scale = False

    def stats(self) -> dict[str, Tensor]:
        """What the last step measured and did; reading it is up to the caller, nothing is synchronised here.

        Returns: `statistic` (S; a lower bound while the gate is clearly shut, inf when it was not measured),
          `threshold` (what S is compared with; inf without a gate), `fires` (so far), `steps_since_fire` (inf before
          the first), `noise_norm` (of the noise added by the last step that drew any), `boosted_next` (whether the next
          step is a boosted one); for the group with the most fires.
        """
        group = self.param_groups[0]
        if self._on_host():
            group = max(self.param_groups, key=lambda group: int(group["fires"]))
        since = torch.as_tensor(group["noise_step"] - 1 - group["last_fire"], dtype=torch.float64)
        return {
            "statistic": torch.as_tensor(self._statistic),
            "threshold": torch.as_tensor(self._threshold(group) if group["mode"] in WITH_GATE else math.inf),
            "fires": torch.as_tensor(group["fires"]),
            "steps_since_fire": torch.where(torch.as_tensor(group["fires"]) > 0, since, math.inf),
            "noise_norm": torch.as_tensor(self._noise_square).sqrt(),
            "boosted_next": torch.as_tensor(self._boost(group) != 1.0),
        }

    def observe(self, square: float | Tensor) -> None:
        """Tell the gates cross and snr an unbiased estimate of ||grad f||^2, once before each step.

        It counts in that step; one that is never taken, because GradScaler skipped it, leaves no trace.
        """
        value = torch.as_tensor(square, dtype=torch.float64)
        self._pending = value if value.device.type != "cpu" else float(value)

    @torch.no_grad()
    def observe_half(self, scale: float = 1.0) -> None:
        """Call after the backward pass of the first half-batch, and again after that of the second; clip then.

        The halves' losses are each divided by 2, as gradient accumulation does. `zero_grad` forgets a first half whose
        second never came.

        Args:
          scale: GradScaler's scale while the gradients are still multiplied by it.
        Raises: ConfigError when the halves gave gradients to different parameters.
        """
        params = [p for p in members(self.param_groups) if p.grad is not None and p.requires_grad]
        if self._half is None:
            self._half = [(p, p.grad.detach().clone()) for p in params]
            return
        half, self._half = self._half, None
        if [id(p) for p, _ in half] != list(map(id, params)):
            raise ConfigError(
                "observe_half: the two half-batches gave gradients to different parameters; use gate='norm'."
            )
        self.observe(gates.cross_product(params, [first for _, first in half]) / scale**2)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; a first half-batch that was observed is forgotten with its gradients."""
        self._half = None
        super().zero_grad(set_to_none)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        name = type(self).__name__
        check_gate(name, group, needs_radius=True)
        if self._owner is not None and (group["gate"] != "norm" or group["noise_scale"] == "relative"):
            raise ConfigError(
                f"{name}: gate={group['gate']!r} with noise_scale={group['noise_scale']!r} needs the gradients and new "
                "values of all parameters, and ZeroRedundancyOptimizer hands each rank a share; use gate='norm' and "
                "noise_scale='energy', or shard with FSDP2."
            )

    def _radius(self, group: dict[str, Any]) -> Any:
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
                    # float32, or a small share of a new gradient would vanish in a low-precision average.
                    dtype = torch.float32 if param.dtype in LOW_PRECISION else None
                    state["gradient_ema"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
                    state["gradient_ema_steps"] = 0
                state["gradient_ema_steps"] += 1
            averages = [local(state["gradient_ema"]) for state in states]
            grads = [grad.to(average.dtype) for grad, average in zip(block.grads, averages, strict=True)]
            if averages:
                torch._foreach_lerp_(averages, grads, 1 - beta)
            vectors += [
                gates.Vector([param], [average], 1 / (1 - beta ** state["gradient_ema_steps"]))
                for param, average, state in zip(block.params, averages, states, strict=True)
            ]
        return vectors

    def _boost(self, group: dict[str, Any]) -> float | Tensor:
        """psi of the coming step."""
        if group["step_boost"] == 1.0:
            return 1.0
        since, device = group["noise_step"] - group["last_fire"], local(group["params"][0]).device
        if device.type != "cpu" and not isinstance(since, Tensor):
            # There counters are tensors from the first fire on, and numbers again behind a save: one arithmetic.
            since = torch.full((), since, device=device)
        return rule.psi(since, group["step_boost"], group["boost_steps"])

    def _decide(self, blocks: list[Block]) -> list[float | Tensor]:
        """Measure, fire, count the step; the noise radius r * phi of each block comes back."""
        if self._is_frozen():
            return [0.0] * len(blocks)
        if self._half is not None:
            self._half = None
            raise ConfigError("observe_half was called after one half-batch only; call it after each of the two.")
        domain = self._domain(blocks)
        numel = self._noise_numel(domain)
        was_told = self._fold_observation()
        asking = [self._asks(block.group, numel) for block in blocks]
        self._statistic = self._measure(domain, asking, was_told) if any(asking) else math.inf
        amounts = [self._amount(block.group, asks, numel) for block, asks in zip(blocks, asking, strict=True)]
        for block in blocks:
            block.group["noise_step"] += 1
        return amounts

    def _noise_numel(self, domain: list[Block]) -> int:
        """d: real numbers that noise may move; all of them where none is to."""
        return total_numel(b for b in domain if not self._is_quiet(b.group)) or total_numel(domain)

    def _shut_grads(self) -> list[list[Tensor]] | None:
        """The gradients of every group if a first piece of them passes every threshold: the usual case, found quickly.

        Returns: None if the gate may open, or asks for more than this rank's whole, dense gradients.
        """
        limit = self._quick_limit()
        if limit is None:
            return None
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

    def _quick_limit(self) -> float | None:
        """The highest threshold, if a gradient norm above it is all that the gates of this step ask for."""
        if self._owner is not None:
            return None
        limits = []
        for group in self.param_groups:
            if group["gate"] != "norm" or group["mode"] not in WITH_GATE or group["lr"] == 0:
                return None
            if group["grad_threshold"] == "auto" and rule.auto_weight(group["noise_step"]):
                return None
            limits.append(self._threshold(group))
        return None if any(isinstance(limit, Tensor) for limit in limits) else max(limits)

    def _amount(self, group: dict[str, Any], asks: bool, numel: int) -> float | Tensor:
        """r * phi of one group; the counters of its fires move."""
        step, mode = group["noise_step"], group["mode"]
        if mode in ("annealed", "constant"):
            fade = 1.0 if mode == "constant" else rule.phi_annealed(step, group["anneal_power"])
            return self._radius(group) * fade if self._is_on(group) else 0.0
        if not asks:
            return 0.0
        threshold, wait = self._threshold(group), self._escape_steps(group, numel)
        if isinstance(self._statistic, float) and not self._statistic <= threshold:
            return 0.0
        fired = rule.fires(self._statistic, threshold, step - group["last_fire"], wait)
        group["last_fire"] = group["last_fire"] + fired * (step - group["last_fire"])
        group["fires"] = group["fires"] + fired * 1
        if self._is_quiet(group):
            return 0.0
        phi = rule.phi_gated(fired) if mode == "gated" else rule.phi_smooth(self._statistic, threshold)
        radius = self._radius(group)
        self._warn_without_scale(radius, phi)
        return radius * phi

    def _asks(self, group: dict[str, Any], numel: int) -> bool:
        """Whether the group wants to know S at this step."""
        if group["mode"] not in WITH_GATE or not self._is_on(group) or not numel:
            return False
        if self._is_quiet(group) and group["step_boost"] == 1.0:
            return False
        # The noise, or the average, needs every step.
        return group["mode"] == "smooth" or group["gate"] == "ema" or self._is_due(group, numel)

    def _is_due(self, group: dict[str, Any], numel: int) -> bool:
        """Whether the automatic threshold wants this step's S, or the wait after the last fire is over."""
        if group["grad_threshold"] == "auto" and rule.auto_weight(group["noise_step"]):
            return True
        since = group["noise_step"] - group["last_fire"]
        return isinstance(since, Tensor) or since > self._escape_steps(group, numel)

    def _measure(self, domain: list[Block], asking: list[bool], was_told: bool) -> float | Tensor:
        first, groups = self.param_groups[0], list(compress(self.param_groups, asking))
        is_automatic = "auto" in [group["grad_threshold"] for group in groups]
        weight = rule.auto_weight(first["noise_step"]) if is_automatic else 0.0
        if first["gate"] in ("cross", "snr"):
            statistic = self._observation(first, was_told)
        else:
            limit = math.inf if weight or not self._on_host() else max(map(self._threshold, groups))
            statistic = self._norm([block for block in domain if block.params], limit)
        if weight:
            median, total = rule.next_median(first["gate_median"], first["gate_median_weight"], statistic, weight)
            for group in self.param_groups:
                group["gate_median"], group["gate_median_weight"] = median, total
        return statistic

    def _norm(self, blocks: list[Block], limit: float) -> float | Tensor:
        """S of the gates norm and ema; above the limit a lower bound of it."""
        if self.param_groups[0]["gate"] == "norm":
            vectors = [gates.Vector(block.params, block.grads) for block in blocks]
        else:
            vectors = self._averages(blocks)
        return gates.vector_norm(vectors, limit, all(block.is_plain for block in blocks))

    def _fold_observation(self) -> bool:
        """Let the estimate that `observe` was told enter the averages of cross and snr, unless it is not finite.

        Returns: whether there was one.
        """
        value, self._pending = self._pending, None
        if value is None or (not isinstance(value, Tensor) and not math.isfinite(value)):
            return value is not None
        first = self.param_groups[0]
        beta = first["gate_beta"]
        new = {"gate_weight": 1.0, "gate_mean": value, "gate_square": value**2}
        averages = {name: beta * first[name] + (1 - beta) * update for name, update in new.items()}
        if isinstance(value, Tensor):
            averages = {name: torch.where(value.isfinite(), mean, first[name]) for name, mean in averages.items()}
        for group in self.param_groups:
            group.update(averages)
        return True

    def _observation(self, first: dict[str, Any], was_told: bool) -> float | Tensor:
        if not was_told:
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
            return rule.AUTO_FRACTION * group["gate_median"]
        return float(group["grad_threshold"])

    def _escape_steps(self, group: dict[str, Any], numel: int) -> int:
        return escape_window(numel) if group["escape_steps"] is None else int(group["escape_steps"])

    def _is_quiet(self, group: dict[str, Any]) -> bool:
        return group["noise_radius"] == 0 or float(group["lr"]) == 0

    def _on_host(self) -> bool:
        return all(not isinstance(group["fires"], Tensor) for group in self.param_groups)

    def _warn_without_scale(self, radius: float | Tensor, phi: float | Tensor) -> None:
        if self._told_no_scale or isinstance(radius, Tensor) or isinstance(phi, Tensor) or radius or not phi:
            return
        self._told_no_scale = True
        warnings.warn(
            f"{type(self).__name__}: every gradient so far is exactly 0, so grad_threshold='auto' has no scale and the "
            "kick's default radius is 0; set noise_radius.",
            stacklevel=5,
        )
