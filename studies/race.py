"""Race optimizers on one problem: each with its own best step size, by steps until the loss is low.

1. Every method is tried with every step size of the grid on `tune_seeds` seeds; the lowest median number of steps wins.
2. With it, `num_seeds` other seeds are run: median steps with a 95 % interval, share that arrived.
3. Loss curves; on problems in two dimensions also the paths, over the contours of the loss.

A run has arrived when its exact loss is at most `minimum + tolerance * (loss at the start - minimum)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.checkpoint import output_directory
from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.stage import How
from studies import draw
from studies.cells import measure_cells
from studies.command import main
from studies.fit import lower_median, median_interval
from studies.methods import Settings, method_named
from studies.page import Table, write_study
from studies.problems import Problem, make
from studies.swarm import Swarm, run_until

Cell = tuple[str, float, int, int]
"""Method, step size, first seed, number of seeds."""

PROTOCOL = (
    "Every method is tried with every step size of the grid on some seeds; the lowest median number of steps wins and "
    "is measured on other seeds. A run has arrived when its exact loss is at most "
    "minimum + tolerance * (loss at the start - minimum)."
)
"""What the page says of the measurement."""
_CURVE_SEEDS = 5


@checked
class RaceConfig:
    """One problem, some optimizers, a grid of step sizes."""

    problem: str = "phase_retrieval"
    """Name of a test problem: any key of studies.problems.PROBLEMS."""
    size: int = 2
    """The problem's own size: coordinates, rows, inputs or width. 2 draws paths where a point is a 2-vector."""
    methods: tuple[str, ...] = ("gd", "heavy_ball", "perturbed_gd", "agld", "agld_momentum", "adam", "adamw")
    """Optimizers that race."""
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """Step sizes to try for each method."""
    start: Literal["saddle", "random"] = "saddle"
    """saddle: exactly at the first known saddle. random: uniform in [-start_scale, start_scale] for each coordinate."""
    start_scale: float = 1.0
    """Half width of the random start."""
    tolerance: float = 0.01
    """Share of the way down from the start that may be left, 0 < x < 1."""
    target_loss: float | None = None
    """Loss to reach instead, needed where the lowest loss is unknown."""
    max_steps: int = 3_000
    """Runs that have not arrived by then count as never arriving."""
    tune_seeds: int = 5
    """Runs to choose each method's step size with."""
    num_seeds: int = 21
    """Runs to measure with, on other seeds."""
    momentum: float = 0.9
    """Momentum of heavy_ball and of the methods called *_momentum."""
    noise_radius: float = 0.01
    """r: root mean square norm of one draw of injected noise."""
    grad_threshold: float = 0.02
    """The gate fires at or below this gradient norm."""
    escape_steps: int | None = None
    """Steps between two fires; null is the O(log d) window."""
    step_boost: float = 10.0
    """ASG: factor of the longer step after a fire."""
    batch_size: int = 256
    """Samples of a mini-batch, for methods that step on mini-batches."""
    seed: int = 0
    """First seed."""
    num_workers: int = 2
    """Processes, one thread each."""

    def __post_init__(self) -> None:
        for name in self.methods:
            method_named(name)
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance must lie in (0, 1); found {self.tolerance}.")
        if not self.lrs or not min(self.lrs) > 0:
            raise ConfigError(f"lrs must be one or more positive step sizes; found {list(self.lrs)}.")
        for name in ("size", "max_steps", "tune_seeds", "num_seeds", "batch_size", "num_workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more; found {getattr(self, name)}.")
        facts = make(self.problem, self.size).facts()
        if facts.minimum_loss is None and self.target_loss is None:
            raise ConfigError(f"race: the lowest loss of {self.problem} is unknown or unbounded. Set target_loss.")
        if self.start == "saddle" and not facts.saddles:
            raise ConfigError(f"race: no saddle of {self.problem} is known. Set start to random.")


def run(config: RaceConfig, out: Path, *, how: How = How()) -> dict[str, Any]:
    """Tune, race, and write result.json, table.md, plots and page.html into `out`; the result comes back."""
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as directory:
        result = measure(config, directory)
        curves = {name: _curve(config, name, found["lr"]) for name, found in result["methods"].items()}
        plots = {"Median loss": directory / "race.png"}
        draw.loss_curves(curves, result["target_loss"], plots["Median loss"])
        problem = make(config.problem, config.size)
        if problem.shape == (2,):
            plots["Paths of three seeds"] = directory / "paths.png"
            draw.paths(problem, {name: points for name, (_, points) in curves.items()}, plots["Paths of three seeds"])
        write_study(
            directory,
            stage="studies.race",
            title=f"Race on {config.problem}, size {config.size}",
            notes=[
                PROTOCOL,
                f"Start: {config.start}. Target loss: {result['target_loss']:.6g}.",
            ],
            config=config,
            result=result,
            tables={"Steps to the target": race_table(result)},
            plots=plots,
        )
    return result


def measure(config: RaceConfig, scratch: Path) -> dict[str, Any]:
    """Best step size, then steps to the target, of every method; files in `scratch` let an interrupted race go on."""
    tuning: list[Cell] = [(name, lr, config.seed, config.tune_seeds) for name in config.methods for lr in config.lrs]
    tuned = measure_cells(measure_cell, config, tuning, scratch / "tuning.jsonl", "tune", config.num_workers)
    best = {name: _best_lr(config, name, tuned) for name in config.methods}
    first = config.seed + config.tune_seeds
    racing: list[Cell] = [(name, lr, first, config.num_seeds) for name, lr in best.items()]
    raced = measure_cells(measure_cell, config, racing, scratch / "cells.jsonl", "race", config.num_workers)
    methods = {cell[0]: _summary(cell[1], found["steps"], config) for cell, found in raced.items()}
    return {"methods": methods, "target_loss": _target(config, make(config.problem, config.size))}


def measure_cell(config: RaceConfig, cell: Cell) -> dict[str, Any]:
    """Steps to the target of some seeds of one method at one step size; None where a run never arrived."""
    name, lr, first_seed, num_seeds = cell
    problem = make(config.problem, config.size)
    swarm, batch = _swarm(config, name, lr, range(first_seed, first_seed + num_seeds))
    target = _target(config, problem)
    arrivals = run_until(
        swarm, lambda points, step: problem.loss(points) <= target, config.max_steps, lambda step: batch
    )
    return {"steps": [steps if math.isfinite(steps) else None for steps in arrivals.steps.tolist()]}


def race_table(result: Mapping[str, Any]) -> Table:
    """One row a method, the fastest first."""
    rows = [
        (
            name,
            found["lr"],
            math.inf if found["median_steps"] is None else found["median_steps"],
            "–" if None in found["interval"] else "{:.0f} to {:.0f}".format(*found["interval"]),
            found["arrived_fraction"],
        )
        for name, found in result["methods"].items()
    ]
    rows.sort(key=lambda row: row[2])
    return ("method", "best lr", "median steps", "95 %", "arrived"), rows


def _swarm(config: RaceConfig, name: str, lr: float, seeds: range) -> tuple[Swarm, int | None]:
    method, problem = method_named(name), make(config.problem, config.size)
    settings = Settings(
        lr=lr,
        momentum=config.momentum,
        noise_radius=config.noise_radius,
        grad_threshold=config.grad_threshold,
        escape_steps=config.escape_steps,
        step_boost=config.step_boost,
    )
    swarm = Swarm(problem, method, settings, _starts(config, problem, seeds), seeds)
    return swarm, config.batch_size if method.is_stochastic else None


def _starts(config: RaceConfig, problem: Problem, seeds: range) -> Tensor:
    if config.start == "saddle":
        return problem.facts().saddles[0].expand(len(seeds), *problem.shape)
    points = [torch.rand(problem.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return problem.project((torch.stack(points) * 2 - 1) * config.start_scale)


def _target(config: RaceConfig, problem: Problem) -> float:
    if config.target_loss is not None:
        return config.target_loss
    first = float(problem.loss(_starts(config, problem, range(config.seed, config.seed + 101))).median())
    lowest = problem.facts().minimum_loss
    assert lowest is not None  # RaceConfig refuses it
    return lowest + config.tolerance * (first - lowest)


def _best_lr(config: RaceConfig, name: str, tuned: Mapping[Cell, Mapping[str, Any]]) -> float:
    def slowness(lr: float) -> tuple[float, float]:
        steps = [
            math.inf if value is None else value for value in tuned[(name, lr, config.seed, config.tune_seeds)]["steps"]
        ]
        # Where the median never arrives, the share that does decides.
        return lower_median(steps), -sum(map(math.isfinite, steps))

    return min(config.lrs, key=slowness)


def _summary(lr: float, steps: list[float | None], config: RaceConfig) -> dict[str, Any]:
    times = [math.inf if value is None else value for value in steps]
    interval = median_interval(times)
    return {
        "lr": lr,
        "lr_is_at_the_edge": lr in (min(config.lrs), max(config.lrs)),
        "median_steps": _plain(lower_median(times)),
        "interval": [_plain(edge) for edge in interval],
        "arrived_fraction": sum(map(math.isfinite, times)) / len(times),
    }


def _curve(config: RaceConfig, name: str, lr: float) -> tuple[list[float], Tensor]:
    """Median loss after each step, and the points of each step `[steps, seeds, *shape]`."""
    first = config.seed + config.tune_seeds
    swarm, batch = _swarm(config, name, lr, range(first, first + min(_CURVE_SEEDS, config.num_seeds)))
    losses, points = [], []
    for _ in range(min(config.max_steps, 1_000) + 1):
        losses.append(float(swarm.problem.loss(swarm.points).median()))
        points.append(swarm.points.clone())
        swarm.step(batch)
    return losses, torch.stack(points)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main(RaceConfig, run, "race")
