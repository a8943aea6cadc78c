"""A grid of runs: every combination of the axes, plus runs listed one by one; each is a full distillation config."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, NamedTuple

from limbeck.config import build, checked, get_field, to_dict
from limbeck.distill.config import DistillConfig
from limbeck.errors import ConfigError
from limbeck.evaluate.run import EvaluateConfig
from limbeck.flags import resolve_path, set_field
from limbeck.teacher.codec import MOST_ENTRIES
from limbeck.traces.sources import TraceConfig
from limbeck.traces.truncate import WITHOUT_FRACTION, exact_fraction


@checked
class SweepConfig:
    """Many students over a grid, one report."""

    distill: DistillConfig
    """The run that the axes vary."""
    problems: TraceConfig
    """Held-out problems with references, for the score. Those that are also training prompts are refused."""
    title: str = "Truncation sweep"
    """Heading of the report."""
    grid: Mapping[str, list[Any]] = field(default_factory=dict)
    """Axis -> values; an axis is a field of distill, by dotted path or by its last name: lead_fraction, preset."""
    runs: list[Mapping[str, Any]] = field(default_factory=list)
    """Further runs, each a mapping of axis to value."""
    match: Literal["examples", "tokens"] = "examples"
    """examples: every run sees the same traces; tokens: every run sees as many tokens as the uncut one."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How students are scored."""
    top_k: int = 128
    """Most teacher entries stored a position, for all runs at once, 0 to 255; 0 keeps the teacher live."""
    evaluate_teacher: bool = True
    """Score the teacher too, where it is a model."""

    def __post_init__(self) -> None:
        if not self.grid and not self.runs:
            raise ConfigError("a sweep needs a grid or runs")
        for axis, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"grid.{axis} must be a list of at least one value; found {values!r}")
        if not 0 <= self.top_k <= MOST_ENTRIES:
            raise ConfigError(f"top_k must be in 0 to {MOST_ENTRIES}; found {self.top_k}")


class PlannedRun(NamedTuple):
    """One run of a sweep."""

    name: str
    """Name of its directory, made of its axes."""
    axes: dict[str, Any]
    """Short axis name -> value."""
    config: DistillConfig


def plan_runs(sweep: SweepConfig) -> list[PlannedRun]:
    """All runs of a sweep, without duplicates, in the order of the grid.

    Raises: ConfigError for an unknown axis or a value that its field refuses.
    """
    combinations = [
        dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values()) if sweep.grid
    ]
    planned: dict[str, PlannedRun] = {}
    axes = axis_paths(sweep)
    for changes in [*combinations, *map(dict, sweep.runs)]:
        tree = to_dict(sweep.distill)
        for axis, value in changes.items():
            set_field(DistillConfig, tree, axis, value, flag=f"axis {axis}")
        config = build(DistillConfig, tree, where=f"run {changes}")
        values = {axis: get_field(config, path) for axis, path in axes.items()}
        run = PlannedRun(run_name(values), values, config)
        if planned.setdefault(run.name, run).config != config:
            raise ConfigError(
                f"two runs would be named {run.name!r}; give them values that differ in letters or digits."
            )
    return list(planned.values())


def axis_paths(sweep: SweepConfig) -> dict[str, str]:
    """Short axis name -> dotted path of every field that the sweep varies."""
    names = [*sweep.grid, *(name for run in sweep.runs for name in run)]
    paths = list(dict.fromkeys(resolve_path(DistillConfig, name, f"axis {name}") for name in names))
    shorts = [path.rsplit(".", 1)[-1] for path in paths]
    return {short if shorts.count(short) == 1 else path: path for short, path in zip(shorts, paths, strict=True)}


def run_name(axes: Mapping[str, Any]) -> str:
    """A directory name such as `lead_fraction-0.5_keep_ending-false`."""
    text = "_".join(
        f"{axis}-{str(value).lower() if isinstance(value, bool) else value}" for axis, value in axes.items()
    )
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text)


def reference_of(run: PlannedRun, runs: list[PlannedRun]) -> PlannedRun | None:
    """The uncut run that `run` is compared with, which differs in nothing but the cut; None when there is none."""

    def rest(config: DistillConfig) -> dict[str, Any]:
        tree = to_dict(config)
        tree.pop("truncation")
        tree["training"].pop("max_tokens")
        return tree

    uncut = [r for r in runs if is_uncut(r.config)]
    return next((other for other in uncut if rest(other.config) == rest(run.config)), None)


def is_uncut(config: DistillConfig) -> bool:
    """Whether the run keeps every token of every trace."""
    cut = config.truncation
    return exact_fraction(cut.lead_fraction) == 1 and cut.policy not in WITHOUT_FRACTION


def tokenizer_name(config: DistillConfig) -> str:
    """The model whose tokenizer the runs of a sweep read.

    Raises: ConfigError when the student is made from scratch.
    """
    if config.student.model is None:
        raise ConfigError("a sweep starts from an existing student; set distill.student.model.")
    return config.student.model
