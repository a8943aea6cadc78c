"""A row of a report: one run and what it measured, checked on the way in.

A row holds the numbers that its run wrote and no others; what was not measured stays missing. Anything that is no
number where a number belongs, NaN included, is refused with the file's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from limbeck.errors import CheckpointError

FLOP_PARTS = ("teacher", "student", "head", "sampling")
ESTIMATES = (
    *("accuracy", "pass_at_k", "retention", "gain_kept", "stop_rate", "end_marker_rate", "output_tokens"),
    *("derivation_right", "answer_as_derived"),
)  # fmt: skip
NUMBERS = (
    *(f"{name}{end}" for name in ESTIMATES for end in ("", "_low", "_high")),
    *("pass_k", "unknown_fraction", "validation_ce", "tokens", "flops", "train_seconds", "peak_bytes"),
    *(f"flops_{part}" for part in FLOP_PARTS),
    *("lost_end_marker_fraction", "lost_first_derivation_fraction", "parameters"),
    *("weight_bytes", "kl_nats", "teacher_kl_nats", "perplexity_ratio", "stage_seconds"),
    *("rollout_mismatch_nats", "learning_rate"),
)  # fmt: skip
"""What a row may measure."""
PLACED_AXES = (
    *("lead_fraction", "keep_ending", "seed"),
    *("truncation.lead_fraction", "truncation.keep_ending", "training.seed"),
)  # fmt: skip
"""Axes with a place of their own in a row, by short name and by path."""


Curve = tuple[tuple[float, float], ...]
"""Tokens read and a value, point after point."""


class Estimate(NamedTuple):
    """A value and its interval; the ends are None where no interval was computed."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run, or a model that was only scored."""

    name: str
    source: str = ""
    """Which of several sweeps it comes from; empty when there is one."""
    lead_fraction: float | None = None
    keep_ending: bool = False
    seed: int | None = None
    control_of: tuple[str, ...] = ()
    """The runs whose cost it has, on whole traces; empty for all others."""
    failed: str = ""
    """Why it has no numbers, where it failed."""
    settings: tuple[tuple[str, str], ...] = ()
    """The other axes and their values, as text."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What was measured, by the names of NUMBERS."""
    problem_scores: Mapping[str, float] = field(default_factory=dict)
    """The score of every problem by its key; none where they were not kept."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """What was logged over the tokens read, by its name; none where the log is not there."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """Everything that the run reported, as it stands in its file."""

    def get(self, name: str) -> float | None:
        """A measured number, or None."""
        return self.numbers.get(name)

    def estimate(self, name: str) -> Estimate | None:
        """A measured number with its interval, or None."""
        value = self.numbers.get(name)
        if value is None:
            return None
        return Estimate(value, self.numbers.get(f"{name}_low"), self.numbers.get(f"{name}_high"))


def rows_of(runs: Sequence[Mapping[str, Any]], axes: Sequence[str], where: str, label: str = "") -> list[Row]:
    """Rows of the `runs` of a summary; `where` names it in errors.

    Raises: CheckpointError when an entry is malformed.
    """
    return [row_of(run, axes, f"{where}: run {number}", label) for number, run in enumerate(runs, start=1)]


def row_of(tree: Any, axes: Sequence[str], where: str, label: str) -> Row:
    """One row from one entry; `label` names its sweep.

    Raises: CheckpointError when the entry is malformed.
    """
    if not isinstance(tree, dict):
        raise CheckpointError(f"{where}: must be a JSON object; found {type(tree).__name__}. Run the sweep again.")
    settings = tuple((axis, _text(tree.get(axis))) for axis in axes if axis not in PLACED_AXES)
    seed = _number(tree, "seed", where)
    return Row(
        name=str(tree.get("name") or where),
        source=label,
        lead_fraction=_lead_fraction(tree, where),
        keep_ending=tree.get("keep_ending") is True,
        seed=None if seed is None else int(seed),
        control_of=_names(tree, where),
        failed=str(tree.get("failed") or ""),
        settings=settings,
        numbers={name: value for name in NUMBERS if (value := _number(tree, name, where)) is not None},
        problem_scores=dict(tree.get("problem_scores") or {}),
        curves=dict(tree.get("curves") or {}),
        raw={name: value for name, value in tree.items() if name not in ("problem_scores", "curves")},
    )


def _lead_fraction(tree: Mapping[str, Any], where: str) -> float | None:
    value = tree.get("lead_fraction")
    if value is None:
        return None
    try:
        fraction = Fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if not 0 < fraction <= 1:
        raise CheckpointError(f"{where}: lead_fraction must be in (0, 1]; found {value!r}. Run the sweep again.")
    return float(fraction)


def _names(tree: Mapping[str, Any], where: str) -> tuple[str, ...]:
    names = tree.get("control_of") or []
    if not isinstance(names, list):
        raise CheckpointError(f"{where}: control_of must be a list of names; found {names!r}. Run the sweep again.")
    return tuple(map(str, names))


def _number(tree: Mapping[str, Any], name: str, where: str) -> float | None:
    value = tree.get(name)
    if value is None:
        return None
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:
        value = "an integer that is out of range"
    raise CheckpointError(f"{where}: {name} must be a finite number or null; found {value!r}. Run the sweep again.")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
