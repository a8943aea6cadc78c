"""Learning rates: every setting of a sweep takes the one with the lowest held-out loss.

The best rate differs between cuts, so a comparison at one rate favours the arm that it suits. The loss is the text's,
over whole held-out traces whatever the cut; a rate at which training diverges loses. Seeds share their setting's rate.

    OUT/tuning/NAME_learning_rate-X/   the students that were tried; the chosen one is also OUT/runs/NAME
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from limbeck.config import config_hash
from limbeck.distill.commands import DISTILL
from limbeck.distill.config import DistillConfig
from limbeck.errors import LimbeckError
from limbeck.progress import console
from limbeck.runner.place import map_in_processes
from limbeck.stage import Place, go_on
from limbeck.sweep.plan import PlannedRun

Tried = tuple[tuple[float, float], ...]
"""Learning rates and the held-out losses that they gave, in nats a token; infinite where training failed."""


def tuned(runs: Sequence[PlannedRun], rates: Sequence[float], out: Path, on: Place) -> list[PlannedRun]:
    """The runs at the rates that their settings take; what is tried is kept, so that a call later goes on."""
    firsts: dict[str, PlannedRun] = {}
    for run in runs:
        firsts.setdefault(setting_of(run.config), run)
    calls = [call for run in firsts.values() for call in _calls(run, rates, out)]
    losses = {directory: loss for (_, directory), loss in map_in_processes(_held_out_loss, _told(calls), on)}
    tried = {
        setting: tuple((rate, losses[_place(run, rate, out)]) for rate in rates) for setting, run in firsts.items()
    }
    for setting, run in firsts.items():
        _adopt(_place(run, best_of(tried[setting]), out), out / "runs" / run.name)
    return [_at_best(run, tried[setting_of(run.config)]) for run in runs]


def best_of(tried: Tried) -> float:
    """The rate with the lowest loss; of equal ones the first."""
    return min(tried, key=lambda pair: pair[1])[0]


def at_rate(config: DistillConfig, rate: float) -> DistillConfig:
    """The run at another learning rate."""
    return replace(config, optimizer=replace(config.optimizer, learning_rate=rate))


def _at_best(run: PlannedRun, tried: Tried) -> PlannedRun:
    return run._replace(config=at_rate(run.config, best_of(tried)), tried=tried)


def setting_of(config: DistillConfig) -> str:
    """The same for runs that differ in nothing but the seed of training."""
    return config_hash(replace(config, training=replace(config.training, seed=0)))


def _calls(run: PlannedRun, rates: Sequence[float], out: Path) -> Iterator[tuple[DistillConfig, Path]]:
    yield from ((at_rate(run.config, rate), _place(run, rate, out)) for rate in rates)


def _place(run: PlannedRun, rate: float, out: Path) -> Path:
    return out / "tuning" / f"{run.name}_learning_rate-{rate:g}"


def _told(calls: Sequence[tuple[DistillConfig, Path]]) -> Iterator[tuple[DistillConfig, Path]]:
    for number, call in enumerate(calls, start=1):
        console.print(f"tuning {number} of {len(calls)}: {call[1].name}", highlight=False)
        yield call


def _held_out_loss(config: DistillConfig, directory: Path) -> float:
    try:
        return float(go_on(DISTILL, config, directory).manifest["metrics"]["validation_ce"])
    except LimbeckError:
        return math.inf


def _adopt(tried: Path, run: Path) -> None:
    """The chosen student as the run itself; its files are shared, not copied."""
    if tried.exists() and not run.exists():
        shutil.copytree(tried, run, copy_function=os.link)
