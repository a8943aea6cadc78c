"""Steps and samples to a second-order point against 1/eps: constant batch, linearly growing batch, full gradients.

1. Runs start exactly at a strict saddle. A run has arrived when the full gradient has norm <= eps and Lanczos finds no
   Hessian eigenvalue below -sqrt(rho eps). Where the gradient is small but the curvature fails, the next test is made
   after 2 % more steps, so steps are known to 2 %.
2. The log of the median is fitted against ln(1/eps); the slope is the exponent.

| schedule | optimizer | batch | step size |
|---|---|---|---|
| constant | ASGLD | b0 | constant_lr * eps^2 * b0 / sigma^2: what the noise at the minimum allows |
| growing | ASGLD | b0 + floor(batch_growth * t) | lr |
| full | AGLD | exact gradients | lr |
| constant_sgd, growing_sgd | SGD: the same without gate and kick | the same | the same |
| full_jitter | gradient descent after one kick of the same radius at the start | exact gradients | lr |

The gate's threshold is eps. A raw gradient norm never falls below sigma / sqrt(b), so with small batches the gate stays
shut and the gradient noise alone leaves the saddle: ASGLD and ASG are then the same method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from limbeck.checkpoint import output_directory
from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.optim.diagnostics import curvature_at, products_needed, second_order
from limbeck.optim.growing_batch import BatchGrowth
from limbeck.stage import How
from studies import draw
from studies.cells import measure_cells
from studies.command import main
from studies.fit import fit_line, lower_median, slope_interval
from studies.methods import Settings, method_named
from studies.page import Table, write_study
from studies.problems import QuarticSaddle, TiltedProblem, ValleySaddle
from studies.swarm import Swarm, run_until

Schedule = Literal["constant", "growing", "full", "constant_sgd", "growing_sgd", "full_jitter"]
Cell = tuple[str, float, int, int]
"""Schedule, eps, first seed, number of seeds."""

PROTOCOL = (
    "Runs start exactly at a strict saddle. A run has arrived when the full gradient has norm <= eps and Lanczos finds "
    "no Hessian eigenvalue below -sqrt(rho eps). The log of the median is fitted against ln(1/eps); the slope is the "
    "exponent."
)
"""What the page says of the measurement."""
METHODS: dict[str, str] = {
    "constant": "asgld",
    "growing": "asgld",
    "full": "agld",
    "constant_sgd": "sgd",
    "growing_sgd": "sgd",
    "full_jitter": "jitter_gd",
}
"""Schedule -> method; the last three are the controls of the first."""
_RETEST = 1.02
_SCREEN_PRODUCTS = 6


@checked
class RatesConfig:
    """One problem, three ways to feed gradients, a grid of accuracies."""

    problem: Literal["quartic_saddle", "valley_saddle"] = "quartic_saddle"
    """quartic_saddle: strongly convex minima. valley_saddle: an endless valley that flattens, near the worst case."""
    schedules: tuple[Schedule, ...] = ("constant", "growing", "full", "constant_sgd", "growing_sgd", "full_jitter")
    """How gradients are fed."""
    epsilons: tuple[float, ...] = (0.1, 0.05, 0.025, 0.0125)
    """Wanted gradient norms, two or more; the saddle must fail the test: gamma > sqrt(rho eps)."""
    num_dims: int = 1_000
    """d: number of coordinates."""
    num_seeds: int = 33
    """Runs for each schedule and eps."""
    seeds_per_cell: int = 11
    """Runs that step side by side in one process."""
    negative_curvature: float = 1.0
    """gamma: downward curvature of the saddle."""
    lr: float = 0.1
    """Step size of the growing batch and of full gradients."""
    constant_lr: float = 1.0
    """Step size of the constant batch, in units of eps^2 b0 / sigma^2; below 2."""
    batch_size: int = 1
    """b0: samples of the constant, and of the first growing, mini-batch."""
    batch_growth: float = 0.02
    """Samples by which the growing batch grows each step."""
    gradient_noise: float = 1.0
    """sigma: norm of the noise of one sample's gradient."""
    max_steps: int = 500_000
    """Runs that have not arrived after this many steps count as never arriving."""
    seed: int = 0
    """First seed."""
    num_workers: int = 2
    """Processes, one thread each."""

    def __post_init__(self) -> None:
        if len(set(self.epsilons)) < 2 or not min(self.epsilons) > 0:
            raise ConfigError(f"epsilons must be two or more different positive numbers; found {list(self.epsilons)}.")
        if not 0 < self.constant_lr < 2:
            raise ConfigError(f"constant_lr must lie in (0, 2); found {self.constant_lr}.")
        for name in ("num_dims", "num_seeds", "seeds_per_cell", "batch_size", "max_steps", "num_workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more; found {getattr(self, name)}.")
        rho = make_problem(self).facts().hessian_lipschitz or 0.0
        if self.negative_curvature <= math.sqrt(rho * max(self.epsilons)):
            limit = self.negative_curvature**2 / rho
            raise ConfigError(
                f"epsilons must stay below gamma^2 / rho = {limit:.3g}, or the saddle itself passes the test."
            )


def run(config: RatesConfig, out: Path, *, how: How = How()) -> dict[str, Any]:
    """Measure, fit, and write result.json, table.md, plots and page.html into `out`; the result comes back."""
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as directory:
        result = measure(config, directory / "cells.jsonl")
        draw.convergence(result, directory / "rates.png")
        write_study(
            directory,
            stage="studies.rates",
            title="Steps and samples to a second-order point",
            notes=[
                PROTOCOL,
                "The claim is an upper bound: exponents at or below it agree with it.",
            ],
            config=config,
            result=result,
            tables={"Exponents of 1/eps": exponent_table(result), "Medians": median_table(result)},
            plots={"Steps and samples against 1/eps": directory / "rates.png"},
        )
    return result


def measure(config: RatesConfig, cells_path: Path) -> dict[str, Any]:
    """Steps and samples of every schedule and eps, and the exponents; `cells_path` lets an interrupted study go on."""
    chunks = range(0, config.num_seeds, config.seeds_per_cell)
    cells: list[Cell] = [
        (schedule, eps, config.seed + start, min(config.seeds_per_cell, config.num_seeds - start))
        for eps in sorted(config.epsilons)
        for schedule in config.schedules
        for start in chunks
    ]
    measured = measure_cells(measure_cell, config, cells, cells_path, "rates", config.num_workers)
    return {schedule: _summary(config, schedule, measured) for schedule in config.schedules}


def measure_cell(config: RatesConfig, cell: Cell) -> dict[str, Any]:
    """Steps and samples of some seeds at one eps, and whether each end point passes a fresh second-order test."""
    schedule, eps, first_seed, num_seeds = cell
    problem = make_problem(config)
    facts = problem.facts()
    method = method_named(METHODS[schedule])
    lr = config.lr
    if schedule.startswith("constant"):
        lr = config.constant_lr * eps**2 * config.batch_size / config.gradient_noise**2
    settings = Settings(lr=lr, noise_radius=lr * eps, grad_threshold=eps)
    tolerance = math.sqrt((facts.hessian_lipschitz or 0.0) * eps)
    products = products_needed(config.num_dims, facts.smoothness or 1.0, tolerance / 2)
    starts = facts.saddles[0].expand(num_seeds, config.num_dims)
    swarm = Swarm(problem, method, settings, starts, range(first_seed, first_seed + num_seeds))
    test = _arrival_test(problem, eps, tolerance, products)
    arrivals = run_until(swarm, test, config.max_steps, _batch_sizes(config, schedule))
    final = second_order(problem.loss, arrivals.points.double(), eps, tolerance, products, seed=1)
    return {
        "steps": [_plain(steps) for steps in arrivals.steps.tolist()],
        "samples": [_plain(samples) for samples in arrivals.samples.tolist()],
        "passes": [bool(passes) for passes in final.passes.tolist()],
        "eigenvalues": final.curvature.eigenvalue.tolist(),
        "residuals": final.curvature.residual.tolist(),
        "num_products": final.curvature.num_products,
    }


def make_problem(config: RatesConfig) -> TiltedProblem:
    """The problem of `config`."""
    gamma, sigma = config.negative_curvature, config.gradient_noise
    if config.problem == "valley_saddle":
        return ValleySaddle(num_dims=config.num_dims, negative_curvature=gamma, gradient_noise=sigma)
    return QuarticSaddle(num_dims=config.num_dims, negative_curvature=gamma, quartic=gamma, gradient_noise=sigma)


def exponent_table(result: Mapping[str, Any]) -> Table:
    """One row a schedule: exponents of steps and of samples, with intervals."""
    rows = [
        (
            schedule,
            found["iterations_exponent"],
            _interval(found["iterations_interval"]),
            found["samples_exponent"],
            _interval(found["samples_interval"]),
            found["arrived_fraction"],
            found["second_order_fraction"],
        )
        for schedule, found in result.items()
    ]
    header = ("schedule", "exponent of steps", "95 %", "exponent of samples", "95 %", "arrived", "pass a fresh test")
    return header, rows


def median_table(result: Mapping[str, Any]) -> Table:
    """One row a schedule and eps: median steps, samples, and steps * eps^2 / ln d, which the claim bounds."""
    rows = [
        (schedule, float(eps), steps, samples, bound)
        for schedule, found in result.items()
        for eps, steps, samples, bound in zip(
            found["median_steps"],
            found["median_steps"].values(),
            found["median_samples"].values(),
            found["steps_over_claim"].values(),
            strict=True,
        )
    ]
    return ("schedule", "eps", "median steps", "median samples", "steps eps² / ln d"), rows


def _arrival_test(
    problem: TiltedProblem, eps: float, tolerance: float, products: int
) -> Callable[[Tensor, int], Tensor]:
    next_test = 0

    def has_arrived(points: Tensor, step: int) -> Tensor:
        nonlocal next_test
        arrived = problem.gradient(points).flatten(1).norm(dim=1) <= eps
        if not arrived.any():
            return arrived
        if step < next_test:
            return torch.zeros_like(arrived)
        # A Ritz value lies above the eigenvalue: where a few products already find one too low, no more are needed.
        for num_products in (min(_SCREEN_PRODUCTS, products), products):
            where = arrived.nonzero().squeeze(-1)
            found = curvature_at(problem.loss, points[where].double(), num_products).eigenvalue
            arrived[where] = found >= -tolerance
            if not arrived.any():
                next_test = math.ceil(step * _RETEST)
                break
        return arrived

    return has_arrived


def _batch_sizes(config: RatesConfig, schedule: str) -> Callable[[int], int | None]:
    if schedule.startswith("full"):
        return lambda step: None
    growth = config.batch_growth if schedule.startswith("growing") else 0.0
    return BatchGrowth(config.batch_size, growth).size_at


def _summary(config: RatesConfig, schedule: str, measured: Mapping[Cell, Mapping[str, Any]]) -> dict[str, Any]:
    epsilons = sorted(config.epsilons, reverse=True)
    cells = {eps: [found for cell, found in measured.items() if cell[:2] == (schedule, eps)] for eps in epsilons}
    steps = [[_number(value) for found in cells[eps] for value in found["steps"]] for eps in epsilons]
    samples = [[_number(value) for found in cells[eps] for value in found["samples"]] for eps in epsilons]
    passes = [value for eps in epsilons for found in cells[eps] for value in found["passes"]]
    arrived = [math.isfinite(value) for group in steps for value in group]
    medians = [lower_median(group) for group in steps]
    iterations_exponent, iterations_interval = _exponent(epsilons, steps)
    has_samples = not schedule.startswith("full")
    samples_exponent, samples_interval = _exponent(epsilons, samples) if has_samples else (None, None)
    names = [f"{eps:g}" for eps in epsilons]
    claim = math.log(config.num_dims)
    return {
        "iterations_exponent": iterations_exponent,
        "iterations_interval": iterations_interval,
        "samples_exponent": samples_exponent,
        "samples_interval": samples_interval,
        "median_steps": {name: _plain(median) for name, median in zip(names, medians, strict=True)},
        "median_samples": {
            name: _plain(lower_median(group)) if has_samples else None
            for name, group in zip(names, samples, strict=True)
        },
        "steps_over_claim": {
            name: _plain(median * eps**2 / claim) for name, median, eps in zip(names, medians, epsilons, strict=True)
        },
        "arrived_fraction": sum(arrived) / len(arrived),
        "second_order_fraction": sum(passes) / len(passes),
    }


def _exponent(epsilons: list[float], groups: list[list[float]]) -> tuple[float | None, tuple[float, float] | None]:
    medians = [lower_median(group) for group in groups]
    if not all(math.isfinite(value) for group in groups for value in group):
        return None, None
    logs = [math.log(1 / eps) for eps in epsilons]
    return fit_line(logs, [math.log(median) for median in medians]).slope, slope_interval(logs, groups, np.log)


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main(RatesConfig, run, "rates")
