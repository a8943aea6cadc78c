"""The octopus, d saddles in a row: gradients until the minimum, for Langevin methods, PerturbedGD, Adam and a rival.

Regime: Du et al. 2017's function with L = tau = e, gamma = 1; starts uniform in [-1, 1]^d, d = 3, 5, 10, 30. A run has
arrived when its loss is within a thousandth of one piece's drop of the minimum. Every method is tuned on 5 seeds over
its own grid (step size 1/(4L) and 1/(2L) for descent, 0.03 to 3 for Adam; noise radius e/100 and e/10; waiting time 5
and 20; momentum 0.7 and 0.9; boost 2 and 3) and measured on 21 others. ASGLD's mini-batch gradients carry noise of norm
0.01; all other methods see exact gradients. Cost is counted in gradients: iterations for every method but the rival.

Bound: plain gradient descent needs time exponential in d, perturbed descent about linear. Keys:
`iterations_over_perturbed_gd` per d, AGLD with momentum over PerturbedGD, both tuned (reach: < 1 at every d); `ratios`
has every method, `iterations` the medians (null: half the runs or more never arrived). `saddle_start_fraction` per
method: share of runs that arrive from exactly the first saddle, where the gradient is exactly zero (d = 10).

Peers: PerturbedGD (Jin et al. 2017), Adam and AdamW without decay, and psd-optimizer 0.1.2 where it can be imported
(`pip install --no-deps --target DIR psd-optimizer==0.1.2`, then PYTHONPATH=DIR): as published, with gradients clipped at
norm 1, and without the clipping.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _study import Outcome, main
from torch import Tensor

from limbeck.optim import AGLD
from limbeck.optim.problems import Octopus
from limbeck.optim.study.cells import measure_cells
from limbeck.optim.study.fit import lower_median, median_interval
from limbeck.optim.study.methods import METHODS, Method, Settings
from limbeck.optim.study.swarm import Swarm, run_until

Setting = tuple[float, float, int, float, float]
"""Step size, noise radius, waiting time, momentum, boost (for the rival: 1 clips gradients, 0 does not)."""
Cell = tuple[str, int, str, Setting, int, int]
"""Method, d, start, setting, first seed, number of seeds."""

SIZE = math.e
DESCENT_LRS = (1 / (4 * SIZE), 1 / (2 * SIZE))
ADAM_LRS = (0.03, 0.1, 0.3, 1.0, 3.0)
RADII, WAITS, MOMENTA, BOOSTS = (SIZE / 100, SIZE / 10), (5, 20), (0.7, 0.9), (2.0, 3.0)
BATCH = 10_000
HEADLINE, REFERENCE = "agld_momentum", "perturbed_gd"
SADDLE_METHODS = ("gd", "perturbed_gd", "agld", "agld_momentum", "adam", "adamw", "perturbed_adamw")


@dataclass(frozen=True, kw_only=True, slots=True)
class OctopusConfig:
    """The grid of dimensions and seeds."""

    dims: tuple[int, ...] = (3, 5, 10, 30)
    saddle_dim: int = 10
    tune_seeds: int = 5
    num_seeds: int = 21
    max_steps: int = 5_000
    num_workers: int = 2


def run(quick: bool, scratch: Path) -> Outcome:
    """Tune, then measure, every method in every dimension."""
    config = OctopusConfig(tune_seeds=1, num_seeds=3, max_steps=1_500) if quick else OctopusConfig()
    name = "quick" if quick else "full"
    grids = {method: list(grid) for method, grid in _grids(quick)}
    tuning: list[Cell] = [
        (method, num_dims, "random", setting, 0, config.tune_seeds)
        for num_dims in sorted(config.dims, reverse=True)
        for method, grid in grids.items()
        for setting in grid
    ]
    tuned = measure_cells(measure_cell, config, tuning, scratch / f"tuning-{name}.jsonl", "tune", config.num_workers)
    best = {
        (method, num_dims): min(
            grid,
            key=lambda s, m=method, d=num_dims: _slowness(tuned[(m, d, "random", s, 0, config.tune_seeds)]["steps"]),
        )
        for method, grid in grids.items()
        for num_dims in config.dims
    }
    racing: list[Cell] = [
        (method, num_dims, "random", best[(method, num_dims)], config.tune_seeds, config.num_seeds)
        for num_dims in sorted(config.dims, reverse=True)
        for method in grids
    ]
    racing += [
        (method, config.saddle_dim, "saddle", best[(method, config.saddle_dim)], config.tune_seeds, config.num_seeds)
        for method in SADDLE_METHODS
    ]
    raced = measure_cells(measure_cell, config, racing, scratch / f"race-{name}.jsonl", "race", config.num_workers)
    return _report(config, list(grids), best, {cell[:3]: found["steps"] for cell, found in raced.items()})


def measure_cell(config: OctopusConfig, cell: Cell) -> dict[str, Any]:
    """Gradients until the minimum of some seeds of one method at one setting; None where a run never arrived."""
    name, num_dims, start, setting, first_seed, num_seeds = cell
    octopus = Octopus(num_dims=num_dims, gradient_noise=1.0)
    seeds = range(first_seed, first_seed + num_seeds)
    starts = torch.zeros(num_seeds, num_dims)
    if start == "random":
        starts = torch.stack([torch.rand(num_dims, generator=torch.Generator().manual_seed(s)) for s in seeds]) * 2 - 1
    target = octopus.facts().minimum_loss + 1e-3 * octopus.drop
    if name.startswith("psd"):
        steps = [
            _rival(octopus, x, setting, target, seed, config.max_steps) for x, seed in zip(starts, seeds, strict=True)
        ]
        return {"steps": steps}
    lr, radius, wait, momentum, boost = setting
    method = METHODS[name] if name in METHODS else Method(BOOSTED[name], has_momentum="momentum" in name)
    settings = Settings(
        lr=lr, momentum=momentum, noise_radius=radius, grad_threshold=SIZE / 100, escape_steps=wait, step_boost=boost
    )
    swarm = Swarm(octopus, method, settings, starts, seeds)

    def has_arrived(points: Tensor, step: int) -> Tensor:
        return octopus.loss(points) <= target

    batch = BATCH if method.is_stochastic else None
    arrivals = run_until(swarm, has_arrived, config.max_steps, lambda step: batch)
    return {"steps": [steps if math.isfinite(steps) else None for steps in arrivals.steps.tolist()]}


def _boosted(params: list[Tensor], settings: Settings, seed: int, momentum: float = 0.0) -> torch.optim.Optimizer:
    """AGLD whose steps are longer for 20 steps after each kick: the adaptive step beside the adaptive noise."""
    return AGLD(
        params,
        settings.lr,
        momentum=momentum,
        grad_threshold=settings.grad_threshold,
        noise_radius=settings.noise_radius,
        escape_steps=settings.escape_steps,
        step_boost=settings.step_boost,
        boost_steps=20,
        seed=seed,
    )


BOOSTED: dict[str, Callable[[list[Tensor], Settings, int], torch.optim.Optimizer]] = {"agld_boost": _boosted}


def _rival(octopus: Octopus, start: Tensor, setting: Setting, target: float, seed: int, cap: int) -> float | None:
    from psd_optimizer import PSDOptimizer  # an optional peer

    lr, radius, episode, _, clips = setting
    point = torch.nn.Parameter(start.clone())
    optimizer = PSDOptimizer(
        [point], lr=lr, epsilon=SIZE / 100, r=radius, T=episode, max_grad_norm=1.0 if clips else None
    )
    torch.manual_seed(seed)
    num_gradients = 0

    def closure() -> Tensor:
        nonlocal num_gradients
        loss = octopus.loss(point.detach())
        if float(loss) <= target or num_gradients >= cap:
            raise _Arrived
        num_gradients += 1
        point.grad = octopus.gradient(point.detach())
        return loss

    try:
        while True:
            optimizer.step(closure)
    except _Arrived:
        return float(num_gradients) if float(octopus.loss(point.detach())) <= target else None


class _Arrived(Exception):
    """Ends the rival's loop from inside its closure, which it calls several times a step."""


def _grids(quick: bool) -> Iterator[tuple[str, Iterator[Setting]]]:
    lrs, radii, waits = DESCENT_LRS, RADII, WAITS
    adam_lrs, momenta, boosts = ADAM_LRS, MOMENTA, BOOSTS
    if quick:
        lrs, radii, waits, adam_lrs, momenta, boosts = lrs[:1], radii[1:], waits[:1], (0.3, 1.0), (0.9,), (3.0,)
    product = itertools.product
    none = (0.0,)
    yield "gd", product(lrs, none, (1,), none, (1.0,))
    yield "heavy_ball", product(lrs, none, (1,), momenta, (1.0,))
    yield "perturbed_gd", product(lrs, radii, waits, none, (1.0,))
    yield "asgld", product(lrs, radii, waits, none, (1.0,))
    yield "asgld_momentum", product(lrs, radii, waits, momenta, (1.0,))
    yield "agld", product(lrs, radii, waits, none, (1.0,))
    yield "agld_boost", product(lrs[:1], radii, (20,), none, boosts)
    yield "agld_momentum", product(lrs, radii, waits, momenta, (1.0,))
    yield "adam", product(adam_lrs, none, (1,), none, (1.0,))
    yield "adamw", product(adam_lrs, none, (1,), none, (1.0,))
    yield "perturbed_adamw", product(adam_lrs, radii, waits, none, (1.0,))
    if importlib.util.find_spec("psd_optimizer"):
        # Its radius is that of each coordinate, and its waiting time the length of an escape episode.
        yield "psd", product(lrs, radii, waits, none, (1.0,))
        yield "psd_unclipped", product(lrs, radii, waits, none, (0.0,))


def _report(
    config: OctopusConfig,
    methods: list[str],
    best: dict[tuple[str, int], Setting],
    steps: dict[tuple[str, int, str], list[float | None]],
) -> Outcome:
    def median(method: str, num_dims: int, start: str = "random") -> float:
        return lower_median(_numbers(steps[(method, num_dims, start)]))

    reference = {num_dims: median(REFERENCE, num_dims) for num_dims in config.dims}
    ratios = {method: {str(d): _plain(median(method, d) / reference[d]) for d in config.dims} for method in methods}
    arrived = {
        method: sum(value is not None for value in steps[(method, config.saddle_dim, "saddle")]) / config.num_seeds
        for method in SADDLE_METHODS
    }
    keys = {
        "iterations_over_perturbed_gd": ratios[HEADLINE],
        "adam_over_ours": {str(d): _plain(median("adam", d) / median(HEADLINE, d)) for d in config.dims},
        "ratios": ratios,
        "iterations": {method: {str(d): _plain(median(method, d)) for d in config.dims} for method in methods},
        "saddle_start_fraction": arrived,
        "rival_measured": "psd" in methods,
    }
    header = ("method", *(f"d = {d}" for d in config.dims))
    rows = [(method, *(_cell(_numbers(steps[(method, d, "random")])) for d in config.dims)) for method in methods]
    ratio_rows = [(method, *(ratios[method][str(d)] for d in config.dims)) for method in methods]
    settings = [
        (method, *(" ".join(f"{value:.3g}" for value in best[(method, d)]) for d in config.dims)) for method in methods
    ]
    saddle = [(method, median(method, config.saddle_dim, "saddle"), arrived[method]) for method in SADDLE_METHODS]
    tables = {
        "Median gradients until the minimum [95 %]": (header, rows),
        "Over PerturbedGD": (header, ratio_rows),
        f"Started exactly at the first saddle, d = {config.saddle_dim}": (("method", "median", "arrived"), saddle),
        "Tuned: step size, noise radius, waiting time, momentum, boost": (header, settings),
    }
    wins = [str(d) for d in config.dims if median("adam", d) < median(HEADLINE, d)]
    note = (
        f"From a random start, tuned Adam is faster than {HEADLINE} at d = {', '.join(wins) or 'none'}; from exactly the "
        f"saddle {arrived['adam']:.0%} of its runs arrive and {arrived[HEADLINE]:.0%} of {HEADLINE}'s."
    )
    return keys, tables, [note]


def _slowness(steps: list[float | None]) -> tuple[float, int]:
    return lower_median(_numbers(steps)), -sum(value is not None for value in steps)


def _numbers(steps: list[float | None]) -> list[float]:
    return [math.inf if value is None else value for value in steps]


def _cell(times: list[float]) -> str:
    low, high = median_interval(times)
    middle = lower_median(times)
    if math.isinf(middle):
        return "never"
    return f"{middle:.0f} [{low:.0f}, {'never' if math.isinf(high) else f'{high:.0f}'}]"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main("octopus", __doc__, run)
