"""Is the gate worth having? ASGLD against every control on eight problems that start at, or pass, a saddle.

All methods see the same mini-batches and are tuned alike: the same step sizes (more on whichever side the best one
lies, until it lies inside) and two variants each. Cost is counted in gradients until the target loss.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.checkpoint import output_directory
from limbeck.config import checked
from limbeck.errors import ConfigError, nearest
from limbeck.stage import How
from studies import draw
from studies.cells import measure_cells
from studies.command import main
from studies.fit import lower_median, median_interval
from studies.methods import METHODS, Settings
from studies.page import Table, write_study
from studies.problems import MatrixFactorisation, Octopus, PhaseRetrieval, Problem, QuarticSaddle, SmallNet
from studies.swarm import Swarm, run_until

Cell = tuple[str, str]
"""Problem and method."""
PROTOCOL = (
    "Each method is tuned on its own seeds over step sizes a factor of 3 apart, widened until the best one lies "
    "inside, times two variants; the lowest median number of gradients wins and is measured on other seeds. A win or a "
    "loss is a 95 % interval of the median that does not meet the best control's."
)
OURS, OTHER = "asgld", "asgld_snr"
"""The method in question, and the same with a gate that tells a small gradient from a noisy one by two half-batches."""
WORDS = {"win": "wins", "tie": "ties", "loss": "losses"}
TRAIN_STEPS = 3_000
"""Steps of Adam that find what a small network can reach."""
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "asgld": ({"noise_radius": 0.01}, {"noise_radius": 0.1}),
    "asgld_snr": ({"noise_radius": 0.01, "gate": "snr"}, {"noise_radius": 0.1, "gate": "snr"}),
    "sgd": ({"momentum": 0.0}, {"momentum": 0.9}),
    "adam": ({}, {}),
    "jitter_sgd": ({"noise_radius": 0.01}, {"noise_radius": 0.1}),
    "jitter_adam": ({"noise_radius": 0.01}, {"noise_radius": 0.1}),
    "noisy": ({"noise_radius": 0.001}, {"noise_radius": 0.01}),
    "sam": ({"noise_radius": 0.01}, {"noise_radius": 0.1}),
    "neon": ({"noise_radius": 0.1}, {"noise_radius": 1.0}),
}
"""Method -> the settings that are tried with every step size."""
_MAKERS = {
    "asgld": "asgld_momentum",
    "asgld_snr": "asgld_momentum",
    "sgd": "sgd_momentum",
    "jitter_sgd": "jitter_sgd_momentum",
    "noisy": "perturbed_sgd",
}


class Start(NamedTuple):
    """A problem, where its runs begin, and how far down they must come."""

    problem: Problem
    begin: Callable[[range], Tensor]
    """Seeds to points `[seeds, *shape]`."""
    target: float
    batch_size: int


@checked
class SaddlesConfig:
    """Which problems and methods, and how thoroughly."""

    problems: tuple[str, ...] = (
        "quartic",
        "octopus",
        "phase_retrieval",
        "factorisation",
        "lora",
        "cloned_units",
        "zeroed_units",
        "bottleneck",
    )
    """Where the runs begin: see `starts`."""
    methods: tuple[str, ...] = tuple(VARIANTS)
    """asgld and its controls."""
    lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Step sizes to begin with, two or more, rising."""
    widenings: int = 3
    """How often the grid may grow on a side."""
    tune_seeds: int = 3
    """Runs to choose each method's settings with."""
    num_seeds: int = 11
    """Runs to measure with, on other seeds."""
    max_steps: int = 1_000
    """Runs that have not arrived by then count as never arriving."""
    num_workers: int = 2
    """Processes, one thread each."""

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in VARIANTS:
                raise ConfigError(f"methods: found {name!r}; {nearest(name, VARIANTS)}")
        for name in self.problems:
            if name not in STARTS:
                raise ConfigError(f"problems: found {name!r}; {nearest(name, STARTS)}")
        if OURS not in self.methods or set(self.methods) <= {OURS, OTHER}:
            raise ConfigError(f"methods: give {OURS} and one control at least.")
        if len(self.lrs) < 2 or list(self.lrs) != sorted(set(self.lrs)) or not self.lrs[0] > 0:
            raise ConfigError(f"lrs must be two or more rising step sizes; found {list(self.lrs)}.")
        for name in ("tune_seeds", "num_seeds", "max_steps", "num_workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more; found {getattr(self, name)}.")


def run(config: SaddlesConfig, out: Path, *, how: How = How()) -> dict[str, Any]:
    """Tune, race, and write result.json, table.md and page.html into `out`; the result comes back."""
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as directory:
        result = measure(config, directory / "cells.jsonl")
        draw.medians(intervals(result), config.max_steps, directory / "saddles.png")
        write_study(
            directory,
            stage="studies.saddles",
            title="ASGLD against its controls at eight saddles",
            notes=[PROTOCOL],
            config=config,
            result=result,
            tables={"Median gradients": median_table(result), "Settings": settings_table(result)},
            plots={"Median gradients": directory / "saddles.png"},
        )
    return result


def measure(config: SaddlesConfig, cells_path: Path) -> dict[str, Any]:
    """Gradients of every method on every problem, and who wins; `cells_path` lets an interrupted study go on."""
    cells: list[Cell] = [(problem, method) for problem in config.problems for method in config.methods]
    found = measure_cells(measure_cell, config, cells, cells_path, "saddles", config.num_workers)
    problems = {problem: {method: found[(problem, method)] for method in config.methods} for problem in config.problems}
    judged = {name: {p: _verdict(methods, name) for p, methods in problems.items()} for name in ours(config.methods)}
    return {
        "problems": problems,
        "verdicts": judged,
        "counts": {
            name: {plural: list(verdicts.values()).count(word) for word, plural in WORDS.items()}
            for name, verdicts in judged.items()
        },
    }


def ours(methods: Collection[str]) -> list[str]:
    """Those of `methods` that are judged; the others are their controls."""
    return [name for name in (OURS, OTHER) if name in methods]


def measure_cell(config: SaddlesConfig, cell: Cell) -> dict[str, Any]:
    """Tune one method on one problem, then measure it."""
    problem, method = cell
    lrs = list(config.lrs)
    tried: dict[tuple[float, int], tuple[float, int]] = {}
    seeds = range(config.tune_seeds)
    for _ in range(2 * config.widenings + 1):
        for lr in lrs:
            for variant in range(len(VARIANTS[method])):
                if (lr, variant) not in tried:
                    best = min(tried.values(), default=(math.inf, 0))[0]
                    cap = config.max_steps if math.isinf(best) else min(config.max_steps, math.ceil(1.5 * best) + 1)
                    tried[(lr, variant)] = _slowness(_race(problem, method, lr, variant, seeds, cap))
        best_lr, best_variant = min(tried, key=lambda setting: tried[setting])
        if math.isinf(tried[(best_lr, best_variant)][0]) or lrs[0] < best_lr < lrs[-1]:
            break
        lrs = [lrs[0] / 3, *lrs] if best_lr == lrs[0] else [*lrs, lrs[-1] * 3]
    measured = _race(problem, method, best_lr, best_variant, range(100, 100 + config.num_seeds), config.max_steps)
    return {
        "gradients": measured,
        "lr": best_lr,
        "variant": VARIANTS[method][best_variant],
        "is_inside": lrs[0] < best_lr < lrs[-1],
        "tried": len(tried),
    }


def median_table(result: Mapping[str, Any]) -> Table:
    """One row a method: median gradients on each problem; the last rows say how ASGLD fares."""
    problems = result["problems"]
    methods = list(next(iter(problems.values())))
    rows: list[tuple[Any, ...]] = [
        (method, *(_cell_text(problems[problem][method]["gradients"]) for problem in problems)) for method in methods
    ]
    for name, verdicts in result["verdicts"].items():
        rows.append((f"{name} against the best control", *(verdicts[problem] for problem in problems)))
    return ("method", *problems), rows


def intervals(result: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, ...]]]:
    """Problem -> method -> median gradients and the ends of its interval; infinite where it never arrives."""
    return {
        problem: {method: _interval(_numbers(found["gradients"])) for method, found in methods.items()}
        for problem, methods in result["problems"].items()
    }


def settings_table(result: Mapping[str, Any]) -> Table:
    """What tuning chose."""
    problems = result["problems"]
    rows = [
        (
            method,
            *(
                f"lr {found['lr']:.3g}{'' if found['is_inside'] else ' (edge)'}"
                + "".join(f", {value:g}" for value in found["variant"].values())
                for found in (problems[problem][method] for problem in problems)
            ),
        )
        for method in next(iter(problems.values()))
    ]
    return ("method", *problems), rows


def _race(problem: str, method: str, lr: float, variant: int, seeds: range, cap: int) -> list[float | None]:
    start = starts(problem)
    common = {"momentum": 0.9, "grad_threshold": "auto", "escape_steps": 20}
    settings = Settings(lr=lr, **{**common, **VARIANTS[method][variant]})
    swarm = Swarm(start.problem, METHODS[_MAKERS.get(method, method)], settings, start.begin(seeds), seeds)

    def has_arrived(points: Tensor, step: int) -> Tensor:
        return (start.problem.loss(points) <= start.target) | (swarm.gradients > cap)

    arrivals = run_until(swarm, has_arrived, cap, lambda step: start.batch_size)
    reached = start.problem.loss(arrivals.points) <= start.target
    counts = torch.where(reached, arrivals.gradients, math.inf).tolist()
    return [count if math.isfinite(count) else None for count in counts]


def _slowness(gradients: list[float | None]) -> tuple[float, int]:
    times = [math.inf if count is None else count for count in gradients]
    return lower_median(times), -sum(map(math.isfinite, times))


def _verdict(methods: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """win, tie or loss of a method of ours against the control with the lowest median."""
    controls = [_numbers(found["gradients"]) for control, found in methods.items() if control not in ours(methods)]
    mine = median_interval(_numbers(methods[name]["gradients"]))
    theirs = median_interval(min(controls, key=lower_median))
    if mine[1] < theirs[0]:
        return "win"
    return "loss" if mine[0] > theirs[1] else "tie"


def _numbers(gradients: list[float | None]) -> list[float]:
    return [math.inf if count is None else count for count in gradients]


def _interval(times: list[float]) -> tuple[float, ...]:
    return lower_median(times), *median_interval(times)


def _cell_text(gradients: list[float | None]) -> str:
    middle, low, high = _interval(_numbers(gradients))
    if math.isinf(middle):
        return "never"
    return f"{middle:.0f} [{low:.0f}, {'never' if math.isinf(high) else f'{high:.0f}'}]"


def _at(point: Tensor) -> Callable[[range], Tensor]:
    return lambda seeds: point.float().expand(len(seeds), *point.shape)


def _known(problem: Problem, batch_size: int, begin: Callable[[range], Tensor] | None = None) -> Start:
    """From the problem's saddle to within 1 % of the way down to its known minimum."""
    facts = problem.facts()
    saddle = facts.saddles[0].float()
    first, lowest = float(problem.loss(saddle)), facts.minimum_loss
    assert lowest is not None
    return Start(problem, begin or _at(saddle), lowest + 0.01 * (first - lowest), batch_size)


def _octopus() -> Start:
    def begin(seeds: range) -> Tensor:
        points = [torch.rand(10, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(points) * 2 - 1

    return _known(Octopus(num_dims=10), 10_000, begin)


def _net(kind: Any, begin: Callable[[SmallNet], Tensor], plateau: Callable[[SmallNet], float]) -> Start:
    """From a symmetric point of a small network to within 5 % of what training finds below its plateau."""
    net = SmallNet(kind=kind)
    lowest = reference_loss(net)
    return Start(net, _at(begin(net)), lowest + 0.05 * (plateau(net) - lowest), 32)


def _at_zero(kind: Any) -> Start:
    zero = lambda net: torch.zeros(net.shape)  # noqa: E731
    return _net(kind, zero, lambda net: float(net.loss(torch.zeros(net.shape))))


def _cloned_units() -> Start:
    alone = SmallNet(kind="tanh", num_hidden=1)
    return _net("tanh", lambda net: net.alike_units(0.3), lambda net: reference_loss(alone))


def _zeroed_units() -> Start:
    return _net("tanh", lambda net: half_zeroed(), lambda net: float(net.loss(half_zeroed())))


STARTS: dict[str, Callable[[], Start]] = {
    "quartic": lambda: _known(QuarticSaddle(num_dims=100), 4096),
    "octopus": _octopus,
    "phase_retrieval": lambda: _known(PhaseRetrieval(num_dims=50), 4096),
    "factorisation": lambda: _known(MatrixFactorisation(num_rows=20), 4096),
    "lora": lambda: _at_zero("linear"),
    "cloned_units": _cloned_units,
    "zeroed_units": _zeroed_units,
    "bottleneck": lambda: _at_zero("bottleneck"),
}
"""lora: both factors of a product are zero. cloned_units: a network grown in width by copies. zeroed_units: two of four
trained units pruned to zero. In these and in bottleneck, every sample's gradient keeps the symmetry. The first four
start at a saddle (octopus: near the first of ten) that the mini-batches' noise leaves."""


@functools.cache
def starts(name: str) -> Start:
    """The problem called `name`, its start and its target."""
    return STARTS[name]()


@functools.cache
def reference_loss(net: SmallNet) -> float:
    """The lowest loss that Adam finds from three random starts."""
    return float(net.loss(_trained(net)).min())


@functools.cache
def half_zeroed() -> Tensor:
    """A network of four units: two trained as a network of two, two zero."""
    small = SmallNet(kind="tanh", num_hidden=2)
    points = _trained(small)
    best = points[small.loss(points).argmin()]
    split = 2 * small.num_inputs
    first = torch.cat([best[:split].view(2, small.num_inputs), torch.zeros(2, small.num_inputs)])
    second = torch.cat([best[split:].view(-1, 2), torch.zeros(len(best[split:]) // 2, 2)], 1)
    return torch.cat([first.flatten(), second.flatten()])


def _trained(net: SmallNet) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.Parameter(0.5 * torch.randn(3, *net.shape, generator=generator))
    optimizer = torch.optim.Adam([points], lr=0.02)
    for step in range(TRAIN_STEPS):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / TRAIN_STEPS)
        points.grad = net.gradient(points.detach())
        optimizer.step()
    return points.detach()


if __name__ == "__main__":
    main(SaddlesConfig, run, "saddles")
