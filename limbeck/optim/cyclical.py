"""Cyclical stochastic gradient MCMC (Zhang, Li, Zhang, Chen, Wilson 2020): explore with long steps, then sample."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from limbeck.errors import ConfigError


def cyclical_factor(step: int, cycle_steps: int) -> float:
    """The learning rate's share of its peak:  (1 + cos(pi (k mod C) / C)) / 2."""
    return 0.5 * (1 + math.cos(math.pi * (step % cycle_steps) / cycle_steps))


def is_exploration(step: int, cycle_steps: int, exploration_fraction: float) -> bool:
    """Whether a step is a noiseless one:  (k mod C) / C < beta."""
    return step % cycle_steps < exploration_fraction * cycle_steps


class CyclicalSampling(LRScheduler):
    """The cosine cycles of cSGLD and cSGHMC, for a sampler: each cycle begins at its peak without noise, then samples.

        for step in range(num_steps):
            ...;  sampler.step()
            if schedule.is_sampling: samples.append(...)
            schedule.step()

    Args:
      optimizer: SGLD, SGHMC, SGNHT or PSGLD; its learning rate is the peak, its temperature that of the sampling.
      cycle_steps: C.
      exploration_fraction: beta, the first share of a cycle, at temperature 0.
    Raises: ConfigError for an optimizer without a temperature and for values that cannot work.
    Source: Zhang, Li, Zhang, Chen, Wilson 2020, arXiv:1902.03932, equation 1 and algorithm 1.
    """

    def __init__(
        self, optimizer: Optimizer, cycle_steps: int, exploration_fraction: float = 0.25, last_epoch: int = -1
    ) -> None:
        if any("temperature" not in group for group in optimizer.param_groups):
            raise ConfigError(f"CyclicalSampling: {type(optimizer).__name__} has no temperature; give it a sampler.")
        if cycle_steps < 1 or not 0 <= exploration_fraction < 1:
            raise ConfigError(
                f"CyclicalSampling: cycle_steps={cycle_steps}, exploration_fraction={exploration_fraction}; one step a "
                "cycle at least, and a fraction in [0, 1)."
            )
        self.cycle_steps, self.exploration_fraction = cycle_steps, exploration_fraction
        for group in optimizer.param_groups:
            group.setdefault("initial_temperature", group["temperature"])
        super().__init__(optimizer, last_epoch)

    @property
    def is_sampling(self) -> bool:
        """Whether the step that was just taken, or comes first, is one whose parameters are a sample."""
        return not is_exploration(self.last_epoch, self.cycle_steps, self.exploration_fraction)

    def get_lr(self) -> list[Any]:
        """The learning rate of every group at this step."""
        return [base * cyclical_factor(self.last_epoch, self.cycle_steps) for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Go to the next step: learning rates and temperatures."""
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["temperature"] = group["initial_temperature"] if self.is_sampling else 0.0
