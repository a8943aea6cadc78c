"""The octopus, d saddles in a row: gradients until the minimum, for Langevin methods, PerturbedGD, Adam and a rival.

Regime: Du et al. 2017's function with L = tau = e, gamma = 1; starts uniform in [-1, 1]^d, d = 3, 5, 10, 30. A run has
arrived when its loss is within a thousandth of one piece's drop of the minimum. Every method is tuned on 5 seeds over
its own grid (step size 1/(4L), 1/(2L) and 0.9/L, near where descent diverges, for descent, 0.3 to 20 for Adam; noise
radius e/100, e/10 and e/3; gate e/100 and e/10; waiting time 5 and 20; momentum 0.5, 0.7, 0.9 and 0.95; boost 2 and 3)
and measured on 21 others. The mini-batch gradients of ASGLD and of its control, SGD with momentum, carry noise of norm
0.01; all other methods see exact gradients. Cost is counted in gradients: iterations for all but the rival.

Bound: plain gradient descent needs time exponential in d, perturbed descent about linear. Keys:
`iterations_over_perturbed_gd` per d, AGLD with momentum over PerturbedGD, both tuned (reach: < 1 at every d); `ratios`
has every method, `iterations` the medians (null: half the runs or more never arrived). Controls: `over_control` has
ASGLD with momentum over SGD with momentum on the same mini-batches, AGLD with momentum over PerturbedGD with momentum
and over heavy ball after one kick at the start; `at_the_edge` names the settings whose best is the first or last of
its grid. `saddle_start_fraction` per method: share of runs that arrive from exactly the first saddle, where the
gradient is exactly zero (d = 10).

Peers: PerturbedGD (Jin et al. 2017), Adam and AdamW without decay, and psd-optimizer 0.1.2 where it can be imported
(`pip install --no-deps --target DIR psd-optimizer==0.1.2`, then PYTHONPATH=DIR): as published, with gradients
clipped at norm 1, and without the clipping.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _study import Outcome, main
from torch import Tensor

from limbeck.optim import AGLD
from studies.cells import measure_cells
from studies.fit import lower_median, median_interval
from studies.methods import METHODS, Method, Settings
from studies.problems import Octopus
from studies.swarm import Swarm, run_until

Cell = tuple[Any, ...]
"""Method and d; to race also the start, first seed, number of seeds, and the fields of a `Setting`."""

SIZE = math.e
DESCENT_LRS = (1 / (4 * SIZE), 1 / (2 * SIZE), 0.9 / SIZE)
ADAM_LRS = (0.3, 1.0, 3.0, 6.0, 10.0, 20.0)
THRESHOLDS = (SIZE / 100, SIZE / 10)
RADII = (*THRESHOLDS, SIZE / 3)
WAITS, MOMENTA, BOOSTS = (5, 20), (0.5, 0.7, 0.9, 0.95), (2.0, 3.0)
BATCH = 10_000
HEADLINE, REFERENCE = "agld_momentum", "perturbed_gd"
OURS = ("asgld", "asgld_momentum", "agld", "agld_momentum", "agld_boost")
CONTROLS = (
    ("asgld_momentum", "sgd_momentum"),
    ("agld_momentum", "perturbed_gd_momentum"),
    ("agld_momentum", "jitter_heavy_ball"),
)
SADDLE_METHODS = (
    "gd",
    "jitter_heavy_ball",
    "perturbed_gd",
    "agld",
    "agld_momentum",
    "adam",
    "adamw",
    "perturbed_adamw",
)


class Setting(NamedTuple):
    """One point of a method's grid; a field that the method does not know is 0."""

    lr: float
    radius: float = 0.0
    """Of the noise; for the rival, of each coordinate's."""
    threshold: float = 0.0
    wait: int = 0
    """Steps between two kicks; for the rival, the length of an escape episode."""
    momentum: float = 0.0
    boost: float = 0.0
    """Factor of the longer steps; for the rival, 1 turns its clipping off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OctopusConfig:
    """The grid of dimensions and seeds."""

    is_quick: bool = False
    """One setting a method, or two, instead of its grid."""
    dims: tuple[int, ...] = (3, 5, 10, 30)
    saddle_dim: int = 10
    tune_seeds: int = 5
    num_seeds: int = 21
    max_steps: int = 4_000
    num_workers: int = 2


def run(quick: bool, scratch: Path) -> Outcome:
    """Tune, then measure, every method in every dimension."""
    config = OctopusConfig(is_quick=True, tune_seeds=1, num_seeds=3, max_steps=1_300) if quick else OctopusConfig()
    name, grids = "quick" if quick else "full", _grids(quick)
    dims = sorted(config.dims, reverse=True)
    tuning: list[Cell] = [(method, num_dims) for num_dims in dims for method in grids]
    tuned = measure_cells(tune_cell, config, tuning, scratch / f"tuning-{name}.jsonl", "tune", config.num_workers)
    best = {(m, d): Setting(*found["setting"]) for (m, d), found in tuned.items()}
    first, number = config.tune_seeds, config.num_seeds
    racing: list[Cell] = [(m, d, "random", first, number, *best[(m, d)]) for d in dims for m in grids]
    at_saddle = config.saddle_dim
    racing += [(m, at_saddle, "saddle", first, number, *best[(m, at_saddle)]) for m in SADDLE_METHODS]
    raced = measure_cells(measure_cell, config, racing, scratch / f"race-{name}.jsonl", "race", config.num_workers)
    return _report(config, grids, best, {cell[:3]: found["steps"] for cell, found in raced.items()})


def tune_cell(config: OctopusConfig, cell: Cell) -> dict[str, Any]:
    """The setting of a method's grid with the lowest median; one that takes half as long again as the best is cut."""
    name, num_dims = cell
    best, slowness = None, (math.inf, 0)
    for setting in _grids(config.is_quick)[name]:
        cap = config.max_steps if math.isinf(slowness[0]) else min(config.max_steps, math.ceil(1.5 * slowness[0]))
        race = (name, num_dims, "random", 0, config.tune_seeds, *setting)
        found = _slowness(measure_cell(dataclasses.replace(config, max_steps=cap), race)["steps"])
        if best is None or found < slowness:
            best, slowness = setting, found
    return {"setting": best}


def measure_cell(config: OctopusConfig, cell: Cell) -> dict[str, Any]:
    """Gradients until the minimum of some seeds of one method at one setting; None where a run never arrived."""
    name, num_dims, start, first_seed, num_seeds, *values = cell
    setting = Setting(*values)
    octopus = Octopus(num_dims=num_dims, gradient_noise=1.0)
    seeds = range(first_seed, first_seed + num_seeds)
    starts = torch.zeros(num_seeds, num_dims)
    if start == "random":
        starts = torch.stack([torch.rand(num_dims, generator=torch.Generator().manual_seed(s)) for s in seeds]) * 2 - 1
    target = octopus.facts().minimum_loss + 1e-3 * octopus.drop
    if name.startswith("psd"):
        cap = config.max_steps
        return {
            "steps": [_rival(octopus, x, setting, target, seed, cap) for x, seed in zip(starts, seeds, strict=True)]
        }
    settings = Settings(
        lr=setting.lr,
        momentum=setting.momentum,
        noise_radius=setting.radius,
        grad_threshold=setting.threshold,
        escape_steps=setting.wait,
        step_boost=setting.boost,
    )
    method = Method(_boosted) if name == "agld_boost" else METHODS[name]
    swarm = Swarm(octopus, method, settings, starts, seeds)

    def has_arrived(points: Tensor, step: int) -> Tensor:
        return octopus.loss(points) <= target

    batch = BATCH if method.is_stochastic else None
    arrivals = run_until(swarm, has_arrived, config.max_steps, lambda step: batch)
    return {"steps": [steps if math.isfinite(steps) else None for steps in arrivals.steps.tolist()]}


def _boosted(params: list[Tensor], settings: Settings, seed: int) -> torch.optim.Optimizer:
    """AGLD whose steps are longer for 20 steps after each kick: the adaptive step beside the adaptive noise."""
    return AGLD(
        params,
        settings.lr,
        grad_threshold=settings.grad_threshold,
        noise_radius=settings.noise_radius,
        escape_steps=settings.escape_steps,
        step_boost=settings.step_boost,
        boost_steps=20,
        seed=seed,
    )


def _rival(octopus: Octopus, start: Tensor, setting: Setting, target: float, seed: int, cap: int) -> float | None:
    from psd_optimizer import PSDOptimizer  # an optional peer

    point = torch.nn.Parameter(start.clone())
    clip = 1.0 if setting.boost == 0 else None
    optimizer = PSDOptimizer(
        [point], lr=setting.lr, epsilon=setting.threshold, r=setting.radius, T=setting.wait, max_grad_norm=clip
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


def _grids(quick: bool) -> dict[str, list[Setting]]:
    """Method -> its settings."""
    lrs, radii, thresholds, waits = DESCENT_LRS, RADII, THRESHOLDS, WAITS
    adam_lrs, momenta, boosts = ADAM_LRS, MOMENTA, BOOSTS
    if quick:
        lrs, radii, thresholds, waits = lrs[:1], radii[1:2], thresholds[1:], waits[:1]
        adam_lrs, momenta, boosts = (1.0,), (0.9,), (3.0,)

    def grid(*choices: Sequence[float]) -> list[Setting]:
        return list(itertools.starmap(Setting, itertools.product(*choices)))

    gate = (radii, thresholds, waits)
    grids = {
        "gd": grid(lrs),
        "heavy_ball": grid(lrs, (0,), (0,), (0,), momenta),
        "sgd_momentum": grid(lrs, (0,), (0,), (0,), momenta),
        "jitter_heavy_ball": grid(lrs, radii, (0,), (0,), momenta),
        "perturbed_gd": grid(lrs, *gate),
        "perturbed_gd_momentum": grid(lrs, *gate, momenta),
        "asgld": grid(lrs, *gate),
        "asgld_momentum": grid(lrs, *gate, momenta),
        "agld": grid(lrs, *gate),
        "agld_momentum": grid(lrs, *gate, momenta),
        "agld_boost": grid(lrs[:1], radii, thresholds, (20,), (0,), boosts),
        "adam": grid(adam_lrs),
        "adamw": grid(adam_lrs),
        "perturbed_adamw": grid(adam_lrs, radii, thresholds, waits[:1]),
    }
    if importlib.util.find_spec("psd_optimizer"):
        grids["psd"] = grid(lrs, radii, thresholds[:1], waits)
        grids["psd_unclipped"] = grid(lrs, radii, thresholds[:1], waits, (0,), (1,))
    return grids


def _report(
    config: OctopusConfig,
    grids: dict[str, list[Setting]],
    best: dict[tuple[str, int], Setting],
    steps: dict[tuple[str, int, str], list[float | None]],
) -> Outcome:
    def median(method: str, num_dims: int, start: str = "random") -> float:
        return lower_median(_numbers(steps[(method, num_dims, start)]))

    methods = list(grids)
    reference = {num_dims: median(REFERENCE, num_dims) for num_dims in config.dims}
    ratios = {method: {str(d): _plain(median(method, d) / reference[d]) for d in config.dims} for method in methods}
    arrived = {
        method: sum(value is not None for value in steps[(method, config.saddle_dim, "saddle")]) / config.num_seeds
        for method in SADDLE_METHODS
    }
    keys = {
        "iterations_over_perturbed_gd": ratios[HEADLINE],
        "best_of_ours_over_perturbed_gd": {
            str(d): _plain(min(median(m, d) for m in OURS) / reference[d]) for d in config.dims
        },
        "adam_over_ours": {str(d): _plain(median("adam", d) / median(HEADLINE, d)) for d in config.dims},
        "over_control": {
            f"{ours}_over_{control}": {str(d): _plain(median(ours, d) / median(control, d)) for d in config.dims}
            for ours, control in CONTROLS
        },
        "at_the_edge": {m: {str(d): _edges(grid, best[(m, d)]) for d in config.dims} for m, grid in grids.items()},
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
        "Tuned: step size, noise radius, gate, waiting time, momentum, boost": (header, settings),
    }
    wins = [str(d) for d in config.dims if median("adam", d) < median(HEADLINE, d)]
    same = [str(d) for d in config.dims if median("asgld_momentum", d) == median("sgd_momentum", d)]
    control = (
        f"SGD with momentum on the same mini-batches takes exactly the steps of asgld_momentum at d = "
        f"{', '.join(same) or 'none'}: there the gate and the kick add nothing."
    )
    note = (
        f"From a random start, tuned Adam is faster than {HEADLINE} at d = {', '.join(wins) or 'none'}. From exactly "
        f"the saddle, {arrived['adam']:.0%} of its runs arrive and {arrived[HEADLINE]:.0%} of {HEADLINE}'s."
    )
    return keys, tables, [note, control]


def _edges(grid: list[Setting], chosen: Setting) -> list[str]:
    """The fields whose choice is the first or the last of three or more."""
    tried = zip(Setting._fields, chosen, map(set, zip(*grid, strict=True)), strict=True)
    return [field for field, value, values in tried if len(values) > 2 and value in (min(values), max(values))]


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
