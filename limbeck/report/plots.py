"""The figures of a report, drawn with matplotlib without a display, for a light and for a dark page.

Score, retention, stopping and output length against the lead fraction; score against each cost with the frontier.
Intervals are vertical bars, single seeds small points. Colours are told apart by colour-blind readers (Okabe and Ito,
Color Universal Design, 2008), and every line has a marker of its own as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from limbeck.report.groups import Group, frontier, lines_of, namer
from limbeck.report.rows import Estimate, Row
from limbeck.report.tables import COSTS
from limbeck.report.units import digits, scale_of

_SIZE_INCHES = (5.0, 3.75)
_MARKERS = "osD^vPX*"
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)))
_LEGEND_LINES = 10
"""More lines than this are drawn without a legend: the table names them."""
_LABELLED_POINTS = 9
"""With more points than this only those on the frontier carry a label."""


class Theme(NamedTuple):
    """Colours of a page."""

    ink: str
    muted: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme(
    "#1d2327", "#5b656d", "#dde1e4", ("#0072b2", "#d55e00", "#009e73", "#b5579a", "#7a5c00", "#2f9fdc", "#4a4a4a")
)  # fmt: skip
DARK = Theme(
    "#e4e8ea", "#a2adb5", "#3a434a", ("#62b6ee", "#ff9a52", "#3fd0a4", "#e7a0cf", "#e6c84f", "#b9dcf5", "#bdbdbd")
)  # fmt: skip


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
            if sum(group.get(key) is not None for group in groups) > 1:
                caption = f"{what} against the lead fraction, with intervals over problems."
                plots.append(Plot(f"{key}_by_lead_fraction", caption, partial(_by_lead, groups, models, key, label)))
    elif sum(group.get("accuracy") is not None for group in groups) > 1:
        plots.append(Plot("accuracy_by_run", "Score of every run, with intervals.", partial(_by_run, groups, models)))
    for key, cost in COSTS.items():
        known = [group for group in groups if group.get(key) is not None and group.get("accuracy") is not None]
        # Runs of one cost would stand above each other and show nothing.
        if len({group.get(key) for group in known}) > 1:
            caption = f"Score against {_COST_AXES[key]}. Ringed and joined: the frontier, beaten by no other run."
            plots.append(Plot(f"accuracy_by_{key}", caption, partial(_by_cost, known, models, key, cost.kind)))
    return plots


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


def render(figure: Figure, kind: str) -> bytes:
    """The figure as `png` or `svg`; the same figure gives the same bytes."""
    stream = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "limbeck"}):
        figure.savefig(stream, format=kind, dpi=160, transparent=kind == "svg", metadata=metadata)
    return stream.getvalue()


def darken(svg: bytes) -> bytes:
    """The same drawing in the colours of a dark page; drawing it again would cost ten times as much."""
    pairs = zip((*LIGHT[:3], *LIGHT.lines), (*DARK[:3], *DARK.lines), strict=True)
    colours = {light.encode(): dark.encode() for light, dark in pairs}
    return re.sub(rb"#[0-9a-f]{6}\b", lambda match: colours.get(match[0], match[0]), svg)


def _by_lead(groups: Sequence[Group], models: Sequence[Row], key: str, label: str) -> Figure:
    """A line a setting over the lead fraction."""
    figure, axes = _canvas()
    lines = lines_of(groups)
    fractions = sorted({group.lead_fraction or 0 for members in lines.values() for group in members})
    name, step = namer(groups, with_lead=False), 0.012 if len(lines) < 6 else 0.004
    for number, members in enumerate(lines.values()):
        # Lines are set apart sideways, so that their intervals do not hide each other.
        shift = step * (number - (len(lines) - 1) / 2)
        known = [group for group in members if group.get(key) is not None]
        style = _style(number)
        places = [(group.lead_fraction or 0) + shift for group in known]
        axes.plot(places, [group.get(key) for group in known], label=name(members[0]), **style)
        for place, group in zip(places, known, strict=True):
            _interval(axes, place, group.estimate(key), style["color"])
            _seeds(axes, [place] * len(group.rows), group, key, style["color"])
    axes.set_xlabel("lead fraction (share of the tokens kept)")
    axes.set_xticks(fractions, [f"{fraction:.3g}" for fraction in fractions])
    axes.set_xlim(0, 1.04)
    axes.set_ylabel(label)
    _limits(axes, key)
    if key != "retention":
        _models(axes, models, key)
    else:
        axes.axhline(1, color=LIGHT.muted, linewidth=1, zorder=1)
    _legend(axes, len(lines))
    return figure


def _by_cost(groups: Sequence[Group], models: Sequence[Row], key: str, kind: Any) -> Figure:
    """Score against a cost, with the frontier."""
    figure, axes = _canvas()
    scale = scale_of([group.get(key) for group in groups], kind)
    name = namer(groups, with_lead=False)
    numbers = {line: number for number, line in enumerate(dict.fromkeys(group.line for group in groups))}
    points = [((group.get(key) or 0) / scale.divisor, group.get("accuracy") or 0) for group in groups]
    flags = frontier(groups, key)
    edge = sorted(point for point, flag in zip(points, flags, strict=True) if flag)
    axes.plot(*zip(*edge, strict=True), color=LIGHT.muted, linewidth=1, drawstyle="steps-post", zorder=1)
    named: set[str] = set()
    has_leads = len({group.lead_fraction for group in groups}) > 1
    for group, (x, y), is_best in zip(groups, points, flags, strict=True):
        style = _style(numbers[group.line]) | {"linestyle": "none"}
        label = name(group)
        axes.plot(x, y, label=None if label in named else label, **style)
        named.add(label)
        _interval(axes, x, group.estimate("accuracy"), style["color"])
        _seeds(axes, [(row.get(key) or 0) / scale.divisor for row in group.rows], group, "accuracy", style["color"])
        if is_best:
            axes.plot(x, y, "o", markersize=12, fillstyle="none", color=LIGHT.ink, markeredgewidth=1.1, zorder=4)
        if has_leads and group.has_fraction and (is_best or len(groups) <= _LABELLED_POINTS):
            text = f"{group.lead_fraction:.3g}"
            axes.annotate(text, (x, y), (8, -10), textcoords="offset points", fontsize=8, color=LIGHT.muted)
    axes.set_xlabel(f"{_COST_AXES[key]} ({scale.unit})")
    axes.set_ylabel("score (fraction of problems right)")
    _room(axes, [x for x, _ in points])
    _limits(axes, "accuracy")
    _models(axes, models, "accuracy")
    _legend(axes, len(numbers))
    return figure


def _by_run(groups: Sequence[Group], models: Sequence[Row]) -> Figure:
    """Score of every group, one below the other, where there is no lead fraction to plot against."""
    known = [group for group in groups if group.get("accuracy") is not None]
    figure, axes = _canvas(height=max(2.2, 0.9 + 0.28 * len(known)))
    name = namer(known)
    for place, group in enumerate(reversed(known)):
        estimate = group.estimate("accuracy")
        assert estimate is not None
        style = _style(0) | {"linestyle": "none"}
        axes.plot(estimate.value, place, **style)
        if estimate.low is not None and estimate.high is not None:
            axes.hlines(place, estimate.low, estimate.high, color=style["color"], linewidth=1.6)
        for row in group.rows if len(group.rows) > 1 else ():
            axes.plot(row.get("accuracy"), place, ".", color=style["color"], alpha=0.5, markersize=5)
    axes.set_yticks(range(len(known)), [name(group) for group in reversed(known)])
    axes.set_xlabel("score (fraction of problems right)")
    axes.set_xlim(0, 1.02)
    for model in models:
        if (score := model.get("accuracy")) is not None:
            axes.axvline(score, color=LIGHT.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                model.name.split(":")[0], (score, 1), (0, 3), ha="center", fontsize=8, color=LIGHT.muted,
                xycoords=("data", "axes fraction"), textcoords="offset points",
            )  # fmt: skip
    return figure


def _canvas(height: float = _SIZE_INCHES[1]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_SIZE_INCHES[0], height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.grid(True, axis="y", color=LIGHT.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=LIGHT.muted, labelsize=9, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LIGHT.muted)
    axes.xaxis.label.set(color=LIGHT.ink, fontsize=9.5)
    axes.yaxis.label.set(color=LIGHT.ink, fontsize=9.5)
    return figure, axes


def _style(number: int) -> dict[str, Any]:
    colours = LIGHT.lines
    return {
        "color": colours[number % len(colours)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(colours) % len(_DASHES)],
        "markersize": 6,
        "linewidth": 1.6,
        "zorder": 3,
    }


def _interval(axes: Any, x: float, estimate: Estimate | None, colour: str) -> None:
    if estimate is not None and estimate.low is not None and estimate.high is not None:
        axes.vlines(x, estimate.low, estimate.high, color=colour, linewidth=1.4, alpha=0.75, zorder=2)


def _seeds(axes: Any, places: Sequence[float], group: Group, key: str, colour: str) -> None:
    if len(group.rows) > 1:
        values = [row.get(key) for row in group.rows]
        axes.plot(places, values, linestyle="none", marker=".", markersize=5, color=colour, alpha=0.5, zorder=2)


def _limits(axes: Any, key: str) -> None:
    """Shares are drawn from 0, so that a small difference looks small."""
    if key in ("accuracy", "stop_rate"):
        axes.set_ylim(0, 1.04)
    else:
        axes.set_ylim(0, max(1.08 if key == "retention" else 0, axes.get_ylim()[1]))


def _room(axes: Any, values: Sequence[float]) -> None:
    """An axis of cost from 0, or a logarithmic one where the costs span more than a factor of 30."""
    low, high = min(values), max(values)
    if low > 0 and high > 30 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 1.5)
    else:
        axes.set_xlim(0, high * 1.08 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _models(axes: Any, models: Sequence[Row], key: str) -> None:
    """Teacher and base student as level lines, named at the left end; lines that are close share a name."""
    near = 0.05 * axes.get_ylim()[1]
    named: list[tuple[float, str]] = []
    for model in models:
        if (value := model.get(key)) is None:
            continue
        axes.axhline(value, color=LIGHT.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        text = f"{model.name.split(':')[0]} {digits(value)}"
        if named and abs(named[-1][0] - value) < near:
            place, other = named.pop()
            named.append((max(place, value), f"{other}, {text}"))
        else:
            named.append((value, text))
    for value, text in named:
        axes.annotate(
            text, (0, value), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=8, color=LIGHT.muted,
        )  # fmt: skip


def _legend(axes: Any, count: int) -> None:
    if 1 < count <= _LEGEND_LINES:
        columns = 2 if count > 3 else 1
        axes.figure.legend(
            loc="outside lower center", ncols=columns if count != 2 else 2, frameon=False, fontsize=8.5,
            labelcolor=LIGHT.ink, handlelength=2.2,
        )  # fmt: skip
