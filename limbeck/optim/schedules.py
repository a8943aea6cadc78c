"""Learning-rate schedules: step -> factor of the peak rate. Pure functions of the step, so nothing to checkpoint."""

from __future__ import annotations

import math
from typing import Literal

from limbeck.config import checked
from limbeck.errors import ConfigError


@checked
class ScheduleConfig:
    """How the learning rate moves over a run."""

    name: Literal["cosine", "one_cycle", "constant", "linear"] = "cosine"
    """cosine and linear fall from the peak after the warm-up; one_cycle warms up along a cosine too; constant stays."""
    warmup_fraction: float = 0.1
    """Share of the steps that warm up, 0 <= x < 1."""
    final_fraction: float = 0.0
    """Rate at the last step as a share of the peak, 0 <= x <= 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(f"warmup_fraction must be in [0, 1); found {self.warmup_fraction}")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction must be in [0, 1]; found {self.final_fraction}")


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate at `step` (0-based) of `total_steps`.

    Warm-up is linear from 1 / warm-up steps to 1 (a cosine from 1/25 for one_cycle, as in torch's OneCycleLR).
    """
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        if config.name == "one_cycle":
            return _cosine(1 / 25, 1.0, step / max(1, warmup))
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    if config.name == "constant":
        return 1.0
    if config.name == "linear":
        return 1.0 + (config.final_fraction - 1.0) * progress
    return _cosine(1.0, config.final_fraction, progress)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
