"""A grid of runs: every combination of the axes, plus runs listed one by one; each is a full distillation config."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
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
    controls: bool = False
    """Beside every cut, whole traces at its FLOPs."""
    tune: list[float] = field(default_factory=list)
    """Learning rates, of which every setting takes the one with the lowest held-out loss, found with its first seed;
    empty takes that of distill."""
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
        self._check_tuning()

    def _check_tuning(self) -> None:
        if any(not 0 < rate < float("inf") for rate in self.tune) or len(set(self.tune)) < len(self.tune):
            raise ConfigError(f"tune must list different learning rates above 0; found {self.tune}")
        if self.tune and self.distill.num_validation == 0:
            raise ConfigError("tune chooses by the held-out loss; set distill.num_validation")
        if self.tune and "optimizer.learning_rate" in axis_paths(self).values():
            raise ConfigError("tune and an axis learning_rate are both set; leave one out")


class PlannedRun(NamedTuple):
    """One run of a sweep."""

    name: str
    """Name of its directory, made of its axes."""
    axes: dict[str, Any]
    """Short axis name -> value."""
    config: DistillConfig
    control_of: tuple[str, ...] = ()
    """The runs whose cost a control has; empty for a run of the sweep itself."""
    tried: tuple[tuple[float, float], ...] = ()
    """Learning rates that were tried for its setting, and the held-out losses that they gave."""


@contextmanager
def naming(run: PlannedRun) -> Iterator[None]:
    """What is wrong with a config is said with the run's name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"run {run.name}: {error}") from None


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
    """The uncut run that `run` is compared with; None when there is none.

    It differs in nothing but the cut, the number of steps, and the learning rate where each setting tunes its own.
    """

    def rest(config: DistillConfig) -> dict[str, Any]:
        tree = to_dict(config)
        for cut in ("truncation", "cut_schedule", "stop_control"):
            tree.pop(cut)
        for limit in ("max_tokens", "max_steps"):
            tree["training"].pop(limit)
        if run.tried:
            tree["optimizer"].pop("learning_rate")
        return tree

    uncut = [r for r in runs if is_uncut(r.config) and not r.control_of]
    return next((other for other in uncut if rest(other.config) == rest(run.config)), None)


def is_uncut(config: DistillConfig) -> bool:
    """Whether the run keeps every token of every trace."""
    cut = config.truncation
    is_fixed = cut.policy in WITHOUT_FRACTION or cut.budget_tokens is not None or config.cut_schedule is not None
    return exact_fraction(cut.lead_fraction) == 1 and not is_fixed


def base_directory(sweep: SweepConfig, run: PlannedRun, out: Path) -> Path:
    """Where the score of a run's base student stands."""
    name = tokenizer_name(run.config)
    return out / ("base" if name == tokenizer_name(sweep.distill) else f"base-{run_name({'student': name})}")


def tokenizer_name(config: DistillConfig) -> str:
    """The model whose tokenizer the runs of a sweep read.

    Raises: ConfigError when the student is made from scratch.
    """
    if config.student.model is None:
        raise ConfigError("a sweep starts from an existing student; set distill.student.model.")
    return config.student.model
