"""Perturb: the gate and the noise for an optimizer that has neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from limbeck.errors import ConfigError
from limbeck.optim.block import members, refuse_sparse
from limbeck.optim.gated import GatedOptimizer
from limbeck.optim.noisy import checked_seed, complete, keep_float32, with_plain_counters
from limbeck.optim.seed import agreed_seed
from limbeck.optim.settings import NOISE_DEFAULTS, Gate, LowPrecision, Mode, NoiseScale, NoiseShape, Threshold, given
from limbeck.optim.wrapper import WrappingOptimizer


class Perturb(WrappingOptimizer, GatedOptimizer):
    """Let `optimizer` take its step, then add the noise that ASGLD would add:  x <- optimizer(x) + r phi_t zeta_t.

    The noise never enters the optimizer's own state. Groups, state and defaults are the optimizer's; the settings below
    are added to its groups, where schedulers and checkpoints find them.

    Args:
      optimizer: any torch optimizer without noise of its own, whose parameters keep their `.grad` through its step
        (AdamW, Muon, SGD ...).
      The rest: as in ASGLD. There is no step boost: the optimizer's own steps are left alone.
    Raises: ConfigError for settings that cannot work; the optimizer is then as it was.
    """

    settings: dict[str, Any]

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        grad_threshold: Threshold = None,
        noise_radius: float | None = None,
        escape_steps: int | None = None,
        mode: Mode = "gated",
        gate: Gate = "norm",
        gate_beta: float = 0.9,
        noise: NoiseShape = "gaussian",
        noise_scale: NoiseScale = "energy",
        anneal_power: float = 0.55,
        noise_steps: int | None = None,
        low_precision: LowPrecision = "stochastic",
        seed: int | None = None,
    ) -> None:
        if any("noise_step" in group for group in optimizer.param_groups):
            raise ConfigError(
                f"Perturb: {type(optimizer).__name__} has settings of noise in its groups: it adds noise of its own or "
                "was perturbed before. Change them there, or wrap a plain optimizer and load states into Perturb."
            )
        if low_precision == "master":
            raise ConfigError(
                "Perturb: low_precision='master' is not possible, the optimizer steps the parameters themselves."
            )
        settings = {**NOISE_DEFAULTS, **given(locals())}
        drawn = checked_seed("Perturb", seed)
        settings["seed"] = agreed_seed(optimizer.param_groups) if drawn is None else drawn
        self._wrap(optimizer, settings=settings)
        before = [dict(group) for group in self.param_groups]
        try:
            for group in self.param_groups:
                self._prepare_group(group)
        except ConfigError:
            for group, kept in zip(self.param_groups, before, strict=True):
                group.clear()
                group.update(kept)
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the optimizer, then add noise if the gate says so.

        Raises: ConfigError for sparse gradients, before anything has moved unless a closure made them.
        """
        if closure is None:
            refuse_sparse(members(self.param_groups))
        with torch.enable_grad():
            loss = self.optimizer.step(closure)
        if self._shut_grads() is not None:
            for group in self.param_groups:
                group["noise_step"] += 1
            return loss
        blocks = self._gather()
        self._add_noise(blocks, self._decide(blocks), [None] * len(blocks))
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer; settings that it does not name are those given to `Perturb`."""
        before = len(self.param_groups)
        self.optimizer.add_param_group(param_group)
        try:
            self._prepare_group(self.param_groups[-1])
        except Exception:
            del self.param_groups[before:]
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's; a first half-batch that was observed is forgotten with its gradients."""
        self._half = None
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, whose groups hold the settings and counters of the noise too."""
        return with_plain_counters(super().state_dict())

    def _load(self, state_dict: dict[str, Any]) -> None:
        """A state of `Perturb`, or one of the bare optimizer, whose noise then starts at its step 0.

        Settings that the state lacks stay as they are, group by group; one that cannot work changes nothing.
        """
        groups, state = self.param_groups, self.state
        self.optimizer.load_state_dict(state_dict)
        try:
            for group, before in zip(self.param_groups, groups, strict=True):
                complete(group, self._counters, before)
                self._check_group(group)
        except ConfigError:
            self.param_groups, self.state = groups, state
            raise
        keep_float32(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: self.__dict__[name] for name in self._transient if name in self.__dict__}
        return {"optimizer": self.optimizer, "settings": self.settings, **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Optimizer.__setstate__(self, state)
        for group in self.param_groups:
            complete(group, self._counters, self.settings)

    def _check_group(self, group: dict[str, Any]) -> None:
        # The optimizer's own settings are its own affair.
        own = {name: group[name] for name in ("lr", *self.settings)}
        super()._check_group(own)
        group["seed"] = own["seed"]

    def _prepare_group(self, group: dict[str, Any]) -> None:
        complete(group, (), self.settings)
        super()._prepare_group(group)
