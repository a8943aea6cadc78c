"""Many independent runs of one optimizer side by side: the points are one tensor, the optimizers are one a run.

Gradients of all runs are taken at once; then the real optimizer of each run steps its own parameter, which is a row of
the tensor. So a study of a hundred seeds costs little more Python than its hundred optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from studies.methods import Method, Settings
from studies.problems import Problem

BatchSize = Callable[[int], int | None]
"""Step to the number of samples in its mini-batch; None asks for the exact gradient."""


class Arrivals(NamedTuple):
    """When each run arrived."""

    steps: Tensor
    """Steps taken until the run was done: `[P]`, float64; infinite where it never was."""
    samples: Tensor
    """Samples drawn by then, exact gradients not counted: `[P]`, float64."""
    points: Tensor
    """Where the runs stopped: `[P, *shape]`."""
    gradients: Tensor
    """Gradients taken until the run was done, as steps: more than the steps where a method takes several a step."""


class Swarm:
    """Runs of one method on one problem; run i starts at `starts[i]` and draws its noise from `seeds[i]`."""

    def __init__(
        self, problem: Problem, method: Method, settings: Settings, starts: Tensor, seeds: Sequence[int]
    ) -> None:
        self.problem, self.method = problem, method
        self._observes = settings.gate in ("cross", "snr")
        self.points = starts.clone()
        self.gradients = torch.zeros(len(starts), dtype=torch.float64)
        self._params = [torch.nn.Parameter(row) for row in self.points]
        self._optimizers = [
            method.make([param], settings, seed) for param, seed in zip(self._params, seeds, strict=True)
        ]
        # Mini-batches and injected noise must not share random numbers: the offset keeps their seeds apart.
        self._generator = torch.Generator().manual_seed(1_000_003 + seeds[0])

    def step(self, batch_size: int | None) -> None:
        """One optimizer step of every run, on a mini-batch of its own or on the exact gradient.

        The gates cross and snr are told of the two halves of the mini-batch.
        """
        batch = None
        if batch_size is None:
            slopes = self.problem.gradient(self.points)
        elif self._observes:
            slopes = self._observed_halves(batch_size)
        else:
            batch = self.problem.draw(len(self.points), batch_size, self._generator)
            slopes = self.problem.batch_gradient(self.points, batch)
        for i, (param, slope, optimizer) in enumerate(zip(self._params, slopes, self._optimizers, strict=True)):
            param.grad = slope
            optimizer.step(self._closure(i, batch) if self.method.needs_closure else None)
        if not self.method.needs_closure:
            self.gradients += 1
        projected = self.problem.project(self.points)
        if projected is not self.points:
            self.points.copy_(projected)

    def _observed_halves(self, batch_size: int) -> Tensor:
        """The mini-batch's gradient from its two halves, of whose product the optimizers are told."""
        first, second = (
            self.problem.batch_gradient(
                self.points, self.problem.draw(len(self.points), batch_size // 2, self._generator)
            )
            for _ in range(2)
        )
        for optimizer, square in zip(self._optimizers, (first * second).flatten(1).sum(1).tolist(), strict=True):
            optimizer.observe(square)  # type: ignore[attr-defined]
        return (first + second) / 2

    def _closure(self, index: int, batch: Tensor | None) -> Callable[[], float]:
        """Loss and gradient of one run where it stands, on the mini-batch of this step."""

        def closure() -> float:
            param = self._params[index]
            point = param.detach().unsqueeze(0)
            self.gradients[index] += 1
            if batch is None:
                param.grad = self.problem.gradient(point).squeeze(0)
                return float(self.problem.loss(point))
            own = batch[index : index + 1]
            param.grad = self.problem.batch_gradient(point, own).squeeze(0)
            return float(self.problem.batch_loss(point, own))

        return closure

    def keep(self, mask: Tensor) -> None:
        """Go on with the runs where `mask` `[P]` is true."""
        self.points, self.gradients = self.points[mask], self.gradients[mask]
        kept = mask.nonzero().squeeze(-1).tolist()
        self._params = [self._params[index] for index in kept]
        self._optimizers = [self._optimizers[index] for index in kept]
        for param, row in zip(self._params, self.points, strict=True):
            param.data = row


def run_until(
    swarm: Swarm,
    is_done: Callable[[Tensor, int], Tensor],
    max_steps: int,
    batch_size: BatchSize = lambda step: None,
) -> Arrivals:
    """Step the swarm until every run is done or `max_steps` are taken.

    Args:
      is_done: points `[P, *shape]` of the runs that go on, and steps taken, to `[P]` bool; asked before the first
        step and after each.
      batch_size: samples of the mini-batch at each step, from 0.
    """
    num_runs = len(swarm.points)
    going = torch.arange(num_runs)
    steps, samples, gradients = (torch.full((num_runs,), math.inf, dtype=torch.float64) for _ in range(3))
    stopped_at = swarm.points.clone()
    drawn = 0
    for step in range(max_steps + 1):
        done = is_done(swarm.points, step)
        if done.any():
            arrived = going[done]
            steps[arrived], samples[arrived] = float(step), float(drawn)
            gradients[arrived] = swarm.gradients[done]
            stopped_at[arrived] = swarm.points[done]
            going = going[~done]
            swarm.keep(~done)
        if not len(going) or step == max_steps:
            break
        size = batch_size(step)
        drawn += size or 0
        swarm.step(size)
    stopped_at[going] = swarm.points
    return Arrivals(steps, samples, stopped_at, gradients)
