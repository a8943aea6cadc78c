"""The figures of a report, drawn with matplotlib without a display, for a light and for a dark page.

Score, retention, stopping and output length against the lead fraction; score against each cost with the frontier.
Intervals are vertical bars, single seeds small points.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from limbeck.report.drawing import (
    LIGHT,
    canvas,
    interval,
    legend,
    limits,
    model_lines,
    room,
    seeds,
    style,
)
from limbeck.report.groups import Group, frontier, lines_of, namer
from limbeck.report.rows import Row
from limbeck.report.tables import COSTS
from limbeck.report.units import scale_of

_LABELLED_POINTS = 9
"""With more points than this only those on the frontier carry a label."""


class Plot(NamedTuple):
    """A figure with its file name and its caption."""

    name: str
    caption: str
    draw: Callable[[], Figure]


def plots_of(groups: Sequence[Group], models: Sequence[Row]) -> list[Plot]:
    """The figures that the measurements allow, in the order of the page."""
    plots = []
    if len({group.lead_fraction for group in groups if group.has_fraction}) > 1:
        for key, label, what in _BY_LEAD:
            if len(_known(groups, key)) > 1:
                caption = f"{what} against the lead fraction, with intervals over problems."
                plots.append(Plot(f"{key}_by_lead_fraction", caption, partial(_by_lead, groups, models, key, label)))
    elif len(_known(groups, "accuracy")) > 1:
        plots.append(Plot("accuracy_by_run", "Score of every run, with intervals.", partial(_by_run, groups, models)))
    for key, cost in COSTS.items():
        known = _known(_known(groups, key), "accuracy")
        # Runs of one cost would stand above each other and show nothing.
        if len({group.get(key) for group in known}) > 1:
            caption = f"Score against {_COST_AXES[key]}. Ringed and joined: the frontier, beaten by no other run."
            plots.append(Plot(f"accuracy_by_{key}", caption, partial(_by_cost, known, models, key, cost.kind)))
    return plots


def _number(measured: Group | Row, key: str) -> float:
    return measured.get(key) or 0.0


def _known(groups: Sequence[Group], key: str) -> list[Group]:
    """The groups of which a quantity was measured."""
    return [group for group in groups if group.get(key) is not None]


_BY_LEAD = (
    ("accuracy", "score (fraction of problems right)", "Score"),
    ("retention", "retention (score over that of whole traces)", "Retention"),
    ("stop_rate", "stop rate (fraction of outputs)", "How often the student stops by itself"),
    ("output_tokens", "mean output length (tokens)", "Output length"),
)
_COST_AXES = {
    "tokens": "tokens trained on",
    "flops": "training FLOPs",
    "train_seconds": "training time",
    "peak_bytes": "peak memory of training",
}


def _by_lead(groups: Sequence[Group], models: Sequence[Row], key: str, label: str) -> Figure:
    """A line a setting over the lead fraction."""
    figure, axes = canvas()
    lines = lines_of(groups)
    fractions = sorted({group.lead_fraction or 0 for members in lines.values() for group in members})
    name, step = namer(groups, with_lead=False), 0.012 if len(lines) < 6 else 0.004
    for number, members in enumerate(lines.values()):
        # Lines are set apart sideways, so that their intervals do not hide each other.
        shift = step * (number - (len(lines) - 1) / 2)
        _lead_line(axes, _known(members, key), key, shift, style(number), name(members[0]))
    axes.set_xlabel("lead fraction (share of the tokens kept)")
    axes.set_xticks(fractions, [f"{fraction:.3g}" for fraction in fractions])
    axes.set_xlim(0, 1.04)
    axes.set_ylabel(label)
    limits(axes, key)
    if key != "retention":
        model_lines(axes, models, key)
    else:
        axes.axhline(1, color=LIGHT.muted, linewidth=1, zorder=1)
    legend(axes, len(lines))
    return figure


def _lead_line(
    axes: Any, groups: Sequence[Group], key: str, shift: float, marks: Mapping[str, Any], label: str
) -> None:
    places = [(group.lead_fraction or 0) + shift for group in groups]
    axes.plot(places, [group.get(key) for group in groups], label=label, **marks)
    for place, group in zip(places, groups, strict=True):
        interval(axes, place, group.estimate(key), marks["color"])
        seeds(axes, [place] * len(group.rows), group, key, marks["color"])


def _by_cost(groups: Sequence[Group], models: Sequence[Row], key: str, kind: Any) -> Figure:
    """Score against a cost, with the frontier."""
    figure, axes = canvas()
    scale = scale_of([group.get(key) for group in groups], kind)
    name = namer(groups, with_lead=False)
    numbers = {line: number for number, line in enumerate(dict.fromkeys(group.line for group in groups))}
    points = [(_number(group, key) / scale.divisor, _number(group, "accuracy")) for group in groups]
    flags = frontier(groups, key)
    edge = sorted(itertools.compress(points, flags))
    axes.plot(*zip(*edge, strict=True), color=LIGHT.muted, linewidth=1, drawstyle="steps-post", zorder=1)
    labels: dict[str, str | None] = {name(group): name(group) for group in groups}
    for group, point, is_best in zip(groups, points, flags, strict=True):
        marks = style(numbers[group.line]) | {"linestyle": "none"}
        # A label stands in the legend once.
        axes.plot(*point, label=labels[name(group)], **marks)
        labels[name(group)] = None
        interval(axes, point[0], group.estimate("accuracy"), marks["color"])
        seeds(axes, [_number(row, key) / scale.divisor for row in group.rows], group, "accuracy", marks["color"])
        _mark_point(axes, groups, group, point, is_best)
    axes.set_xlabel(f"{_COST_AXES[key]} ({scale.unit})")
    axes.set_ylabel("score (fraction of problems right)")
    room(axes, [x for x, _ in points])
    limits(axes, "accuracy")
    model_lines(axes, models, "accuracy")
    legend(axes, len(numbers))
    return figure


def _mark_point(axes: Any, groups: Sequence[Group], group: Group, point: tuple[float, float], is_best: bool) -> None:
    """A ring on the frontier, and the lead fraction where there is room for it."""
    if is_best:
        axes.plot(*point, "o", markersize=12, fillstyle="none", color=LIGHT.ink, markeredgewidth=1.1, zorder=4)
    has_leads = len({other.lead_fraction for other in groups}) > 1
    if has_leads and group.has_fraction and (is_best or len(groups) <= _LABELLED_POINTS):
        text = f"{group.lead_fraction:.3g}"
        # Above and left of the frontier there is never a point.
        shift, side = ((-8, 5), "right") if is_best else ((8, -10), "left")
        axes.annotate(text, point, shift, ha=side, textcoords="offset points", fontsize=8, color=LIGHT.muted)


def _by_run(groups: Sequence[Group], models: Sequence[Row]) -> Figure:
    """Score of every group, one below the other, where there is no lead fraction to plot against."""
    known = _known(groups, "accuracy")
    figure, axes = canvas(height=max(2.2, 0.9 + 0.28 * len(known)))
    name = namer(known)
    for place, group in enumerate(reversed(known)):
        estimate = group.estimate("accuracy")
        assert estimate is not None
        marks = style(0) | {"linestyle": "none"}
        axes.plot(estimate.value, place, **marks)
        if estimate.low is not None and estimate.high is not None:
            axes.hlines(place, estimate.low, estimate.high, color=marks["color"], linewidth=1.6)
        for row in group.rows if len(group.rows) > 1 else ():
            axes.plot(row.get("accuracy"), place, ".", color=marks["color"], alpha=0.5, markersize=5)
    axes.set_yticks(range(len(known)), [name(group) for group in reversed(known)])
    axes.set_xlabel("score (fraction of problems right)")
    axes.set_xlim(0, 1.02)
    _model_marks(axes, models)
    return figure


def _model_marks(axes: Any, models: Sequence[Row]) -> None:
    """A line at the score of each model."""
    for model in models:
        if (score := model.get("accuracy")) is not None:
            axes.axvline(score, color=LIGHT.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                model.name.split(":")[0], (score, 1), (0, 3), ha="center", fontsize=8, color=LIGHT.muted,
                xycoords=("data", "axes fraction"), textcoords="offset points",
            )  # fmt: skip
