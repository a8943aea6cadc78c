"""The section on pipelines: what every stage was expected to take and took, and the models along the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from limbeck.report.drawing import LIGHT, canvas, style
from limbeck.report.pipelined import Along, StageRow
from limbeck.report.plots import Plot
from limbeck.report.tables import Table, sized
from limbeck.report.units import MISSING, Kind, scale_of, share

HOW_TO_READ = (
    "Expected: from the recipe and for this machine, before the stage ran; measured: when it ran, in this call or in "
    "an earlier one whose output is still good. FLOPs are those that the ledger counts; products of calibration and of "
    "the solvers of pruning and quantisation are in neither column. Memory is the growth of the stage's own process."
)
_COSTS: dict[str, tuple[str, Kind]] = {
    "seconds": ("", "seconds"),
    "flops": ("", "flops"),
    "peak_bytes": ("peak", "bytes"),
    "tokens": ("", "tokens"),
}


def stage_table(steps: Sequence[StageRow]) -> Table:
    """One line a stage: whether it ran, and every cost as expected and as measured."""
    columns: dict[str, Sequence[str]] = {"stage": [step.name for step in steps]}
    columns["last call"] = ["ran" if step.ran else "kept" for step in steps]
    for key, (title, kind) in _COSTS.items():
        expected = [step.predicted.get(key) or None for step in steps]
        measured = [step.measured.get(key) or None for step in steps]
        scale = scale_of([*expected, *measured], kind)
        unit = f"{title}, {scale.unit}".strip(", ")
        columns[f"expected {unit}"] = list(map(scale.write, expected))
        columns[f"measured {unit}"] = list(map(scale.write, measured))
    return Table.of(columns)


def model_table(models: Sequence[Along]) -> Table:
    """One line a model: its score, how long it answers, and its size."""
    numbers = [model.numbers for model in models]
    columns: dict[str, Sequence[str]] = {"model": [model.name for model in models]}
    columns["score"] = [_interval(row, "accuracy") for row in numbers]
    columns["of the teacher's"] = [share(row.get("of_teacher")) for row in numbers]
    columns["stops by itself"] = [share(row.get("stop_rate")) for row in numbers]
    columns["output tokens"] = [_number(row.get("output_tokens"), ".0f") for row in numbers]
    columns["perplexity"] = [_number(row.get("perplexity"), ".3f") for row in numbers]
    columns |= sized(numbers, "parameters", "number", "parameters, {}")
    columns |= sized(numbers, "weight_bytes", "bytes", "on disk, {}")
    return Table.of(columns)


def pipeline_findings(steps: Sequence[StageRow], models: Sequence[Along]) -> list[str]:
    """What the last model has of the first, and what all of it took."""
    found = []
    scored = [model for model in models if model.numbers.get("accuracy") is not None]
    if len(scored) > 1:
        first, last = scored[0], scored[-1]
        size = _ratio(last, first, "weight_bytes")
        of_size = f" with {100 * size:.1f} % of its bytes" if size else ""
        found.append(
            f"From {first.name} to {last.name}: score {_interval(first.numbers, 'accuracy')} to "
            f"{_interval(last.numbers, 'accuracy')}{of_size}."
        )
    both = [step for step in steps if step.predicted.get("flops") and step.measured.get("flops")]
    if both:
        worst = max(both, key=lambda step: abs(_off(step)))
        found.append(
            f"FLOPs were predicted for {len(both)} stages; the largest error is {100 * _off(worst):+.1f} %, of "
            f"{worst.name}."
        )
    return found


def pipeline_plots(steps: Sequence[StageRow]) -> list[Plot]:
    """Seconds of every stage; none without a pipeline."""
    if not any(step.measured.get("seconds") for step in steps):
        return []
    return [
        Plot("pipeline", "Where the time of the pipeline went: measured, and expected before.", partial(_bars, steps))
    ]


def _bars(steps: Sequence[StageRow]) -> Figure:
    figure, axes = canvas(0.34 * len(steps) + 1.1)
    places = range(len(steps))
    measured = [step.measured.get("seconds") or 0.0 for step in steps]
    expected = [(place, step.predicted["seconds"]) for place, step in enumerate(steps) if step.predicted.get("seconds")]
    axes.barh(places, measured, height=0.6, color=style(0)["color"], label="measured")
    if expected:
        lines, values = zip(*expected, strict=True)
        axes.plot(values, lines, "|", color=LIGHT.ink, markersize=13, markeredgewidth=2, label="expected")
    axes.set_yticks(list(places), [step.name for step in steps])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.grid(False)
    axes.legend(fontsize=8.5, frameon=False, labelcolor=LIGHT.ink)
    return figure


def _off(step: StageRow) -> float:
    return float(step.predicted["flops"]) / float(step.measured["flops"]) - 1


def _ratio(one: Along, other: Along, key: str) -> float | None:
    top, bottom = one.numbers.get(key), other.numbers.get(key)
    return float(top) / float(bottom) if top and bottom else None


def _interval(row: Mapping[str, Any], key: str) -> str:
    if row.get(key) is None:
        return MISSING
    ends = [row.get(f"{key}_{end}") for end in ("low", "high")]
    known = f" ({ends[0]:.3f}–{ends[1]:.3f})" if None not in ends else ""
    return f"{row[key]:.3f}{known}"


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)
