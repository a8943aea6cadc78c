"""Perturb: the gate and the noise for an optimizer that has neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from limbeck.errors import ConfigError
from limbeck.optim.injection import NoisyOptimizer, with_plain_counters
from limbeck.optim.settings import Gate, LowPrecision, Mode, NoiseScale, NoiseShape, chosen

Groups = list[dict[str, Any]]


class Perturb(NoisyOptimizer):
    """Let `optimizer` take its step, then add the noise that ASGLD would add:  x <- optimizer(x) + r phi_t
    zeta_t.

    The noise never enters the optimizer's own state. Groups, state and defaults are the optimizer's; the
    settings below are added to its groups, where schedulers and checkpoints find them.

    Args:
      optimizer: any torch optimizer whose parameters keep their `.grad` through its step (AdamW, Muon, SGD
        ...).
      The rest: as in ASGLD. There is no step boost: the optimizer's own steps are left alone.
    Raises: ConfigError for settings that cannot work.
    """

    optimizer: Optimizer
    settings: dict[str, Any]

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        grad_threshold: float | Literal["auto"] | None = None,
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
        seed: int = 0,
    ) -> None:
        settings = chosen(locals())
        if low_precision == "master":
            raise ConfigError(
                "Perturb: low_precision='master' is not possible, the optimizer steps the parameters themselves."
            )
        # Optimizer.__init__ would make groups of its own; __setstate__ sets up hooks and profiling alone.
        Optimizer.__setstate__(self, {"optimizer": optimizer, "settings": settings})
        for group in self.param_groups:
            self._add_settings(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the optimizer, then add noise if the gate says so."""
        with torch.enable_grad():
            loss = self.optimizer.step(closure)
        if self._shut_grads() is not None:
            for group in self.param_groups:
                group["noise_step"] += 1
            return loss
        blocks = self._gather()
        self._add_noise(blocks, self._decide(blocks))
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer; settings that it does not name are those given to `Perturb`."""
        self.optimizer.add_param_group(param_group)
        self._add_settings(self.param_groups[-1])

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, whose groups hold the settings and counters of the noise too."""
        return with_plain_counters(self.optimizer.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of `Perturb`, or one of the bare optimizer: the noise then starts at its step 0."""
        self.optimizer.load_state_dict(state_dict)
        for group in self.param_groups:
            self._add_settings(group)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "settings": self.settings}

    def _add_settings(self, group: dict[str, Any]) -> None:
        for name, value in self.settings.items():
            group.setdefault(name, value)
        self._prepare_group(group)

    @property
    def param_groups(self) -> Groups:  # type: ignore[override]
        """The optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The optimizer's."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer's."""
        return self.optimizer.defaults
