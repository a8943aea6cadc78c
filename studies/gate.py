"""When does the gate open? grad_threshold="auto" beside a fixed one and no gate, on the way into thirteen saddles.

Runs start where exact gradients lead into the saddle and not past it: a symmetry, or coordinates that are 0, keep them
there. Each saddle is approached fast and, with a fifth of the step size, slowly. A run has left when its loss is
halfway between that of the saddle and the lowest one. Then the other side: how often the gate opens in training that
meets no saddle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.checkpoint import output_directory
from limbeck.config import checked
from limbeck.errors import ConfigError, nearest
from limbeck.optim.langevin import ASGLD
from limbeck.stage import How
from studies.cells import measure_cells
from studies.command import main
from studies.fit import lower_median
from studies.methods import Method, Settings
from studies.page import Table, write_study
from studies.problems import (
    AsymmetricFactorisation,
    DeepLinear,
    MatrixFactorisation,
    Octopus,
    OnlinePCA,
    PhaseRetrieval,
    Problem,
    QuarticSaddle,
    SmallNet,
    TensorDecomposition,
)
from studies.saddles import reference_loss
from studies.swarm import Swarm, run_until

Cell = tuple[str, str, float]
"""Saddle, gate, share of the step size."""
GATES: dict[str, Any] = {"auto": "auto", "fixed": 0.02, "plain": None}
"""What is compared; plain has no gate and no noise."""


class Way(NamedTuple):
    """A start that leads into a saddle."""

    problem: Problem
    start: Tensor
    lr: float
    """Step size of the fast approach."""
    saddle_loss: float
    lowest: float

    @property
    def target(self) -> float:
        """Halfway down from the saddle."""
        return (self.saddle_loss + self.lowest) / 2


@checked
class GateConfig:
    """Which saddles, and how long."""

    saddles: tuple[str, ...] = (
        "quartic",
        "flat_quartic",
        "octopus",
        "phase_retrieval",
        "factorisation",
        "asymmetric",
        "pca",
        "free_pca",
        "tensor",
        "deep_linear",
        "linear_net",
        "tanh_net",
        "autoencoder",
    )
    """Names of starts: see `WAYS`."""
    lr_shares: tuple[float, ...] = (1.0, 0.2)
    """Step sizes, as shares of each saddle's own."""
    noise_radius: float = 0.01
    """r, of both gates."""
    num_seeds: int = 3
    """Runs of each."""
    distance: float = 400.0
    """Steps times step size after which a run that is still there counts as never leaving."""
    training_steps: int = 4_000
    """Steps of the training in which no saddle is met."""
    num_workers: int = 2
    """Processes, one thread each."""

    def __post_init__(self) -> None:
        for name in self.saddles:
            if name not in WAYS:
                raise ConfigError(f"saddles: found {name!r}; {nearest(name, WAYS)}")
        for name in ("noise_radius", "num_seeds", "distance", "training_steps", "num_workers"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0; found {getattr(self, name)}.")


def run(config: GateConfig, out: Path, *, how: How = How()) -> dict[str, Any]:
    """Measure, and write result.json, table.md and page.html into `out`; the result comes back."""
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as directory:
        result = measure(config, directory / "cells.jsonl")
        write_study(
            directory,
            stage="studies.gate",
            title="When does the gate open?",
            notes=[" ".join((__doc__ or "").split())],
            config=config,
            result=result,
            tables={"Steps until the saddle is left": left_table(result), "In training": training_table(result)},
            plots={},
        )
    return result


def measure(config: GateConfig, cells_path: Path) -> dict[str, Any]:
    """Steps and fires of every gate at every saddle, and fires in training; `cells_path` lets a study go on."""
    cells: list[Cell] = [(s, gate, share) for share in config.lr_shares for s in config.saddles for gate in GATES]
    cells += [("training", name, 1.0) for name in TRAININGS]
    found = measure_cells(measure_cell, config, cells, cells_path, "gate", config.num_workers)
    return {
        "ways": [
            {"saddle": saddle, "lr": WAYS[saddle]().lr * share, **{g: found[(saddle, g, share)] for g in GATES}}
            for share in config.lr_shares
            for saddle in config.saddles
        ],
        "training": {name: found[("training", name, 1.0)] for name in TRAININGS},
    }


def measure_cell(config: GateConfig, cell: Cell) -> dict[str, Any]:
    """Steps until a saddle is left, or the fires of a training."""
    name, gate, share = cell
    if name == "training":
        return {"fires": _fires_in_training(config, gate)}
    way = WAYS[name]()
    lr = way.lr * share
    settings = Settings(lr=lr, momentum=0.0, noise_radius=config.noise_radius, grad_threshold=GATES[gate] or 0.0)
    method = Method(_plain if gate == "plain" else _gated)
    seeds = range(config.num_seeds)
    swarm = Swarm(way.problem, method, settings, way.start.expand(len(seeds), *way.start.shape), seeds)
    arrivals = run_until(
        swarm, lambda points, step: way.problem.loss(points) <= way.target, math.ceil(config.distance / lr)
    )
    return {"steps": [steps if math.isfinite(steps) else None for steps in arrivals.steps.tolist()]}


def left_table(result: Mapping[str, Any]) -> Table:
    """One row a saddle and step size: median steps until it is left."""
    rows = [
        (way["saddle"], f"{way['lr']:.3g}", *(median_steps(way[gate]["steps"]) for gate in GATES))
        for way in result["ways"]
    ]
    return ("saddle", "step size", *GATES), rows


def training_table(result: Mapping[str, Any]) -> Table:
    """One row a training without a saddle: how often the automatic gate opened."""
    return ("training", "fires"), [(name, found["fires"]) for name, found in result["training"].items()]


def median_steps(steps: list[float | None]) -> float:
    """Infinite where half the runs or more never left."""
    return lower_median([math.inf if count is None else count for count in steps])


def _gated(params: list[Tensor], settings: Settings, seed: int) -> torch.optim.Optimizer:
    return ASGLD(
        params, settings.lr, grad_threshold=settings.grad_threshold, noise_radius=settings.noise_radius, seed=seed
    )


def _plain(params: list[Tensor], settings: Settings, seed: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, settings.lr)


def _fires_in_training(config: GateConfig, name: str) -> int:
    make, lr, batch_size = TRAININGS[name]
    problem = make()
    start = 0.3 * torch.randn(1, *problem.shape, generator=torch.Generator().manual_seed(0))
    settings = Settings(lr=lr, noise_radius=1e-9, grad_threshold="auto")
    optimizers: list[torch.optim.Optimizer] = []

    def noted(params: list[Tensor], settings: Settings, seed: int) -> torch.optim.Optimizer:
        optimizers.append(_gated(params, settings, seed))
        return optimizers[-1]

    swarm = Swarm(problem, Method(noted), settings, start, [0])
    for _ in range(config.training_steps):
        swarm.step(batch_size)
    return int(optimizers[0].param_groups[0]["fires"])


def _known(problem: Problem, start: Tensor, lr: float, saddle: Tensor | None = None) -> Way:
    facts = problem.facts()
    lowest = facts.minimum_loss
    assert lowest is not None
    stands = facts.saddles[0] if saddle is None else saddle
    return Way(problem, start, lr, float(problem.loss(stands.double())), lowest)


def _across(num_dims: int, scale: float = 1.0) -> Tensor:
    """A point whose first coordinate is 0."""
    point = scale * torch.randn(num_dims, generator=torch.Generator().manual_seed(3))
    point[0] = 0.0
    return point


def _octopus() -> Way:
    octopus = Octopus(num_dims=5)
    # Coordinates after the first are 0: every saddle after the first is met exactly.
    return _known(octopus, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), 0.09, octopus.facts().saddles[1])


def _factors(problem: MatrixFactorisation | AsymmetricFactorisation, saddle: Tensor) -> Way:
    return _known(problem, 0.4 * saddle, 0.05, saddle)


def _tensor() -> Way:
    rows = torch.eye(5)
    rows[:2, :2] = torch.tensor([1.0, 0.4])
    saddle = rows.clone()
    saddle[:2, :2] = 0.5**0.5
    return _known(TensorDecomposition(), TensorDecomposition().project(rows), 0.05, saddle)


def _alike(kind: Any) -> Way:
    net, alone = SmallNet(kind=kind), SmallNet(kind=kind, num_hidden=1)
    return Way(net, net.alike_units(0.2), 0.1, reference_loss(alone), reference_loss(net))


def _deep_linear() -> Way:
    problem = DeepLinear(num_layers=2)
    one = torch.zeros(problem.shape)
    one[:, 0, 0] = 1.0
    return _known(problem, 0.5 * one, 0.1, one)


def _asymmetric() -> Way:
    problem = AsymmetricFactorisation()
    one = problem.facts().minima[0].clone()
    one[:, 1:] = 0.0
    return _factors(problem, one)


WAYS: dict[str, Callable[[], Way]] = {
    "quartic": lambda: _known(QuarticSaddle(num_dims=10), _across(10), 0.5),
    "flat_quartic": lambda: _known(QuarticSaddle(negative_curvature=0.02, quartic=0.02), _across(10), 0.5),
    "octopus": _octopus,
    "phase_retrieval": lambda: _known(PhaseRetrieval(), _across(10, 0.1), 0.1),
    "factorisation": lambda: _factors(MatrixFactorisation(), MatrixFactorisation().facts().saddles[1]),
    "asymmetric": _asymmetric,
    "pca": lambda: _known(OnlinePCA(), OnlinePCA().project(_across(10)), 0.3),
    "free_pca": lambda: _known(OnlinePCA(on_sphere=False), _across(10, 0.3), 0.1),
    "tensor": _tensor,
    "deep_linear": _deep_linear,
    "linear_net": lambda: _alike("linear"),
    "tanh_net": lambda: _alike("tanh"),
    "autoencoder": lambda: _alike("autoencoder"),
}
"""flat_quartic: the way out is fifty times flatter than the rest. octopus: the second of five saddles. factorisation,
asymmetric, deep_linear: the first of the components is found and the others are not. tensor: two rows are
equal, and share two components. The nets' hidden units are all alike."""

TRAININGS: dict[str, tuple[Callable[[], Problem], float, int | None]] = {
    "tanh_net, batch 32": (lambda: SmallNet(kind="tanh"), 0.05, 32),
    "bottleneck, batch 32": (lambda: SmallNet(kind="bottleneck"), 0.05, 32),
    "phase_retrieval, batch 256": (lambda: PhaseRetrieval(num_dims=50), 0.05, 256),
    "bottleneck, exact": (lambda: SmallNet(kind="bottleneck"), 0.05, None),
}
"""Problem, step size, mini-batch: runs from a random start to a minimum, or on towards one at infinity."""


if __name__ == "__main__":
    main(GateConfig, run, "gate")
