"""Escape time against ln d: how long the real optimizers take to leave one strict saddle, up to a million dimensions.

1. Runs start exactly at the saddle and end at |a| >= distance along the way out.
2. The median over seeds is fitted by `intercept + slope * ln d`; the theory says `slope = 1 / (2 ln z)`, z the growth a
   step along the way out (`theory.escape_slope`), when the noise has the same energy in every dimension.
3. Controls: noise of fixed size per coordinate must give slope 0, and noiseless gradient descent must never leave an
   axis-aligned saddle.

The same seeds are used in every dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from limbeck.checkpoint import output_directory
from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.optim.theory import escape_slope
from limbeck.stage import How
from studies import draw
from studies.cells import measure_cells
from studies.command import main
from studies.fit import fit_line, lower_median, slope_interval
from studies.methods import Settings, method_named
from studies.page import Table, write_study
from studies.problems import PhaseRetrieval, QuadraticSaddle, QuarticSaddle
from studies.swarm import Swarm, run_until

SaddleProblem = QuadraticSaddle | QuarticSaddle | PhaseRetrieval
Cell = tuple[str, str, int, int, int]
"""Method, noise, d, first seed, number of seeds."""

_CHUNK_SCALARS = 4_000_000
_LARGE = 1_000_000


@checked
class EscapeConfig:
    """One saddle, some methods, many dimensions."""

    problem: Literal["quartic_saddle", "rotated_saddle", "quadratic_saddle", "phase_retrieval"] = "quartic_saddle"
    """Which saddle. In phase_retrieval negative_curvature is not used: it is 2 there."""
    methods: tuple[str, ...] = ("asgld", "asg", "agld")
    """Optimizers to measure."""
    dims: tuple[int, ...] = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
    """Numbers of coordinates d, two or more of them."""
    num_seeds: int = 101
    """Runs in each dimension below a million."""
    num_seeds_large: int = 9
    """Runs in dimensions from a million on."""
    null_seeds: int = 101
    """Runs in each dimension with noise of fixed size per coordinate; 0 leaves this control out."""
    lr: float = 0.5
    """Step size; the curvature across the saddle is 1."""
    negative_curvature: float = 0.4
    """gamma: downward curvature of the saddle, whose minima are at distance 1."""
    momentum: float = 0.9
    """Momentum of the methods called *_momentum."""
    noise_radius: float = 0.01
    """r: root mean square norm of one draw of injected noise."""
    grad_threshold: float = 0.02
    """The gate fires at or below this gradient norm."""
    escape_steps: int | None = None
    """Steps between two fires; null is the O(log d) window."""
    step_boost: float = 10.0
    """ASG: factor of the longer step after a fire."""
    gradient_noise: float = 1.0
    """sigma: norm of the noise of one sample's gradient, for methods that step on mini-batches."""
    batch_size: int = 4096
    """Samples of a mini-batch: the gradient noise has norm sigma / sqrt(batch_size)."""
    distance: float = 0.5
    """|a| at which a run has left the saddle."""
    max_steps: int = 20_000
    """Runs that are still there after this many steps count as never leaving."""
    control_steps: int = 2_000
    """Steps of the noiseless control."""
    seed: int = 0
    """First seed."""
    num_workers: int = 2
    """Processes, one thread each."""

    def __post_init__(self) -> None:
        for name in self.methods:
            method_named(name)
        if len(set(self.dims)) < 2 or min(self.dims) < 2:
            raise ConfigError(f"dims must be two or more different numbers of 2 or more; found {list(self.dims)}.")
        for name in ("num_seeds", "num_seeds_large", "batch_size", "max_steps", "num_workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more; found {getattr(self, name)}.")
        for name in ("lr", "negative_curvature", "noise_radius", "grad_threshold", "distance"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0; found {getattr(self, name)}.")


def run(config: EscapeConfig, out: Path, *, how: How = How()) -> dict[str, Any]:
    """Measure, fit, and write result.json, table.md, plots and page.html into `out`; the result comes back."""
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as directory:
        result = measure(config, directory / "cells.jsonl")
        draw.escape_times(result, directory / "escape.png")
        write_study(
            directory,
            stage="studies.escape",
            title="Escape time against dimension",
            notes=_notes(config, result),
            config=config,
            result=result,
            tables={"Fits": fit_table(result), "Median steps": median_table(result)},
            plots={"Median steps against d": directory / "escape.png"},
        )
    return result


def measure(config: EscapeConfig, cells_path: Path) -> dict[str, Any]:
    """Escape times of every method and dimension, and their fits; `cells_path` lets an interrupted study go on."""
    cells = list(_cells(config))
    measured = measure_cells(measure_cell, config, cells, cells_path, "escape", config.num_workers)
    pooled: dict[tuple[str, str], dict[int, list[float]]] = {}
    for (name, noise, num_dims, _, _), found in measured.items():
        times = pooled.setdefault((name, noise), {}).setdefault(num_dims, [])
        times += [math.inf if steps is None else steps for steps in found["steps"]]
    methods = {name: _summary(config, name, pooled) for name in config.methods}
    control = pooled[("gd", "none")]
    left = sum(math.isfinite(time) for times in control.values() for time in times)
    return {
        "methods": methods,
        "control_steps": config.control_steps,
        "control_left_saddle": {str(num_dims): _plain(times[0]) for num_dims, times in control.items()},
        "control_num_left": left,
    }


def measure_cell(config: EscapeConfig, cell: Cell) -> dict[str, Any]:
    """Escape steps of some seeds of one method in one dimension; None where a run never left."""
    name, noise, num_dims, first_seed, num_seeds = cell
    method, problem = method_named(name), make_problem(config, num_dims, noise)
    # Per coordinate, all noise grows with sqrt(d): the threshold too, or the gate would shut in high dimension.
    growth = math.sqrt(num_dims / min(config.dims)) if noise == "coordinate" else 1.0
    settings = Settings(
        lr=config.lr,
        momentum=config.momentum,
        noise_radius=config.noise_radius / (math.sqrt(min(config.dims)) if noise == "coordinate" else 1.0),
        grad_threshold=config.grad_threshold * growth,
        escape_steps=config.escape_steps,
        step_boost=config.step_boost,
        noise_scale="coordinate" if noise == "coordinate" else "energy",
    )
    start = problem.facts().saddles[0].expand(num_seeds, num_dims)
    swarm = Swarm(problem, method, settings, start, range(first_seed, first_seed + num_seeds))

    def has_left(points: Tensor, step: int) -> Tensor:
        return problem.escape_coordinate(points).abs() >= config.distance

    batch = config.batch_size if method.is_stochastic else None
    limit = config.control_steps if noise == "none" else config.max_steps
    arrivals = run_until(swarm, has_left, limit, lambda step: batch)
    return {"steps": [_plain(steps) for steps in arrivals.steps.tolist()]}


def make_problem(config: EscapeConfig, num_dims: int, noise: str = "energy") -> SaddleProblem:
    """The saddle of `config` in `num_dims` dimensions; `coordinate` noise has the energy of `energy` in the fewest."""
    sigma = config.gradient_noise
    if noise == "coordinate":
        sigma *= math.sqrt(num_dims / min(config.dims))
    gamma = config.negative_curvature
    if config.problem == "phase_retrieval":
        return PhaseRetrieval(num_dims=num_dims, gradient_noise=sigma)
    if config.problem == "quadratic_saddle":
        return QuadraticSaddle(num_dims=num_dims, negative_curvature=gamma, gradient_noise=sigma)
    rotation = 0 if config.problem == "rotated_saddle" else None
    return QuarticSaddle(
        num_dims=num_dims, negative_curvature=gamma, quartic=gamma, rotation_seed=rotation, gradient_noise=sigma
    )


def fit_table(result: Mapping[str, Any]) -> Table:
    """One row a method: the measured slope with its interval, beside the predicted one, and the null."""
    header = ("method", "slope", "95 % interval", "predicted", "ratio", "R²", "log-log exponent", "slope of the null")
    rows = [
        (
            name,
            found["slope"],
            f"{found['slope_low']:.3g} to {found['slope_high']:.3g}",
            found["predicted_slope"],
            found["slope_over_predicted"],
            found["r_squared"],
            found["loglog_exponent"],
            found["per_coordinate_slope"],
        )
        for name, found in result["methods"].items()
    ]
    return header, rows


def median_table(result: Mapping[str, Any]) -> Table:
    """One row a method and noise: median steps in each dimension."""
    rows: list[Sequence[Any]] = []
    dims: list[str] = []
    for name, found in result["methods"].items():
        dims = list(found["medians"])
        rows.append((name, *found["medians"].values()))
        if found["null_medians"]:
            rows.append((f"{name}, noise per coordinate", *found["null_medians"].values()))
    return ("method", *(f"d = {int(num_dims):,}" for num_dims in dims)), rows


def _cells(config: EscapeConfig) -> list[Cell]:
    cells: list[Cell] = []
    for num_dims in sorted(config.dims, reverse=True):
        num_seeds = config.num_seeds if num_dims < _LARGE else config.num_seeds_large
        null_seeds = min(config.null_seeds, num_seeds)
        for name in config.methods:
            cells += [(name, "energy", num_dims, *chunk) for chunk in _chunks(config.seed, num_seeds, num_dims)]
            cells += [(name, "coordinate", num_dims, *chunk) for chunk in _chunks(config.seed, null_seeds, num_dims)]
        cells.append(("gd", "none", num_dims, config.seed, 1))
    return cells


def _chunks(first_seed: int, num_seeds: int, num_dims: int) -> list[tuple[int, int]]:
    size = max(1, min(num_seeds, _CHUNK_SCALARS // num_dims)) if num_seeds else 1
    return [(first_seed + start, min(size, num_seeds - start)) for start in range(0, num_seeds, size)]


def _summary(config: EscapeConfig, name: str, pooled: Mapping[tuple[str, str], Mapping[int, list[float]]]) -> dict:
    times = dict(sorted(pooled[(name, "energy")].items()))
    null = dict(sorted(pooled.get((name, "coordinate"), {}).items()))
    medians = [lower_median(group) for group in times.values()]
    gamma = make_problem(config, min(config.dims)).facts().negative_curvature or 0.0
    predicted = escape_slope(config.lr, gamma, config.momentum if method_named(name).has_momentum else 0.0)
    summary: dict[str, Any] = {
        "predicted_slope": predicted,
        "medians": {str(num_dims): _plain(median) for num_dims, median in zip(times, medians, strict=True)},
        "quartiles": {str(num_dims): _quartiles(group) for num_dims, group in times.items()},
        "num_seeds": {str(num_dims): len(group) for num_dims, group in times.items()},
        "null_medians": {str(num_dims): _plain(lower_median(group)) for num_dims, group in null.items()},
    }
    keys = ("slope", "slope_low", "slope_high", "slope_over_predicted", "r_squared", "loglog_exponent")
    if not all(map(math.isfinite, medians)):
        return {**summary, **dict.fromkeys(keys), "per_coordinate_slope": None}
    logs = [math.log(num_dims) for num_dims in times]
    line, loglog = fit_line(logs, medians), fit_line(logs, [math.log(median) for median in medians])
    low, high = slope_interval(logs, list(times.values()))
    null_logs = [math.log(num_dims) for num_dims in null]
    null_medians = [lower_median(group) for group in null.values()]
    fitted = (line.slope, low, high, line.slope / predicted, line.r_squared, loglog.slope)
    is_flat_known = len(null) > 1 and all(map(math.isfinite, null_medians))
    flat = fit_line(null_logs, null_medians).slope if is_flat_known else None
    return {
        **summary,
        **dict(zip(keys, fitted, strict=True)),
        "intercept": line.intercept,
        "per_coordinate_slope": flat,
    }


def _notes(config: EscapeConfig, result: Mapping[str, Any]) -> list[str]:
    left = result["control_num_left"]
    return [
        f"Steps from the saddle of {config.problem} until |a| >= {config.distance:g}; lr {config.lr:g}.",
        f"Noiseless gradient descent left the saddle in {left} of {len(config.dims)} dimensions within "
        f"{config.control_steps} steps; a rotated saddle is left by round-off.",
        f"Settings: {dataclasses.asdict(config)}",
    ]


def _quartiles(times: Sequence[float]) -> list[float | None]:
    ordered = np.sort(np.asarray(times, float))
    return [_plain(float(ordered[int(share * (len(ordered) - 1))])) for share in (0.25, 0.75)]


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main(EscapeConfig, run, "escape")
