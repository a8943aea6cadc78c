"""The look of every figure, and how it becomes a file: colours, markers, frame, intervals, seeds, legend.

Colours are told apart by colour-blind readers (Okabe and Ito, Color Universal Design, 2008), and every line has a
marker of its own as well.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from limbeck.report.groups import Group
from limbeck.report.rows import Estimate, Row
from limbeck.report.units import digits

_SIZE_INCHES = (5.0, 3.75)
_MARKERS = "osD^vPX*"
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)))
_LINE_LETTERS = 70
"""Letters of a line of a label."""
_COLUMN_LETTERS = 45
"""Letters of the longest label of which two stand side by side."""
_LEGEND_LINES = 10
"""More lines than this are drawn without a legend: the table names them."""


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


def canvas(height: float = _SIZE_INCHES[1]) -> tuple[Figure, Any]:
    """Figure and axes with the grid and the frame of every plot."""
    figure = Figure(figsize=(_SIZE_INCHES[0], height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    _dress(axes)
    return figure, axes


def panels(titles: Sequence[str], share_x: bool = True) -> tuple[Figure, list[Any]]:
    """Figure and small axes that share their scales, or only the vertical one, two a row, one for each title."""
    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    size = (_SIZE_INCHES[0], _SIZE_INCHES[1] if rows < 3 else 1.6 * rows + 0.7)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    drawn = list(figure.subplots(rows, columns, sharex=share_x, sharey=True, squeeze=False).flat)
    for axes in drawn[len(titles) :]:
        axes.remove()
    for axes, title in zip(drawn, titles, strict=False):
        _dress(axes)
        axes.set_title(title, loc="left", fontsize=9, color=LIGHT.ink)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.tick_params(labelbottom=True)
    return figure, drawn[: len(titles)]


def _dress(axes: Any) -> None:
    axes.set_facecolor("none")
    axes.grid(True, axis="y", color=LIGHT.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=LIGHT.muted, labelsize=9, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LIGHT.muted)
    axes.xaxis.label.set(color=LIGHT.ink, fontsize=9.5)
    axes.yaxis.label.set(color=LIGHT.ink, fontsize=9.5)


def style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line of this number."""
    colours = LIGHT.lines
    return {
        "color": colours[number % len(colours)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(colours) % len(_DASHES)],
        "markersize": 6,
        "linewidth": 1.6,
        "zorder": 3,
    }


def interval(axes: Any, x: float, estimate: Estimate | None, colour: str) -> None:
    """A vertical bar over the interval, where there is one."""
    if estimate is not None and estimate.low is not None and estimate.high is not None:
        axes.vlines(x, estimate.low, estimate.high, color=colour, linewidth=1.4, alpha=0.75, zorder=2)


def seeds(axes: Any, places: Sequence[float], group: Group, key: str, colour: str) -> None:
    """Every seed as a small point, where there are several."""
    if len(group.rows) > 1:
        values = [row.get(key) for row in group.rows]
        axes.plot(places, values, linestyle="none", marker=".", markersize=5, color=colour, alpha=0.5, zorder=2)


def limits(axes: Any, key: str) -> None:
    """Shares are drawn from 0, so that a small difference looks small."""
    if key in ("accuracy", "stop_rate"):
        axes.set_ylim(0, 1.04)
    else:
        axes.set_ylim(0, max(1.08 if key == "retention" else 0, axes.get_ylim()[1]))


def room(axes: Any, values: Sequence[float]) -> None:
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


def upright(axes: Any, values: Sequence[float]) -> None:
    """A vertical axis from 0, or a logarithmic one where the values span more than a factor of 30."""
    low, high = min(values), max(values)
    if low > 0 and high > 30 * low:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, high * 1.08 or 1)


def model_lines(axes: Any, models: Sequence[Row], key: str) -> None:
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


def legend(axes: Any, count: int) -> None:
    """What the lines mean, below the axes."""
    if 1 < count <= _LEGEND_LINES:
        handles, labels = axes.get_legend_handles_labels()
        columns = 2 if count != 3 and max(map(len, labels), default=0) <= _COLUMN_LETTERS else 1
        axes.figure.legend(
            handles, [textwrap.fill(label, _LINE_LETTERS) for label in labels],
            loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5,
            labelcolor=LIGHT.ink, handlelength=2.2,
        )  # fmt: skip
