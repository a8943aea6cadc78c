"""Learning curves: the loss of the steps and of the held-out traces over the tokens read, all runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from limbeck.report.drawing import canvas, legend, room, style
from limbeck.report.groups import Group, namer
from limbeck.report.plots import Plot
from limbeck.report.rows import Curve
from limbeck.report.units import scale_of

_MOST_POINTS = 60
"""Points of a line; more steps than that are put together."""
_MARKERS = 10
_CURVES = (
    ("loss", "loss of the steps (nats a token)", "Training loss over the tokens read; of many steps, means."),
    ("validation_ce", "held-out CE (nats a token)", "Held-out loss on whole traces over the tokens read."),
)


def curve_plots(groups: Sequence[Group]) -> list[Plot]:
    """A figure for each curve of which some run has two points."""
    return [
        Plot(f"{column}_by_tokens", caption, partial(_draw, groups, column, label))
        for column, label, caption in _CURVES
        if any(len(row.curves.get(column, ())) > 1 for group in groups for row in group.rows)
    ]


def binned(curve: Curve, most: int = _MOST_POINTS) -> Curve:
    """The curve itself, or the means of at most `most` equal parts of its points.

    >>> binned(((1.0, 4.0), (2.0, 2.0), (3.0, 1.0), (4.0, 1.0)), most=2)
    ((1.5, 3.0), (3.5, 1.0))
    """
    if len(curve) <= most:
        return curve
    parts = np.array_split(np.array(curve), most)
    return tuple((float(x), float(y)) for x, y in (part.mean(axis=0) for part in parts))


def _draw(groups: Sequence[Group], column: str, label: str) -> Figure:
    """A line a run; those that differ in nothing but the seed have one colour and one label."""
    figure, axes = canvas()
    name = namer(groups)
    lines = [(number, row) for number, group in enumerate(groups) for row in group.rows if row.curves.get(column)]
    longest = max(row.curves[column][-1][0] for _, row in lines)
    scale, named = scale_of([longest], "tokens"), set[int]()
    for number, row in lines:
        points = binned(row.curves[column])
        axes.plot(
            [tokens / scale.divisor for tokens, _ in points],
            [value for _, value in points],
            label=None if number in named else name(groups[number]),
            markevery=max(1, len(points) // _MARKERS),
            **style(number) | {"markersize": 3.5, "linewidth": 1.2},
        )
        named.add(number)
    axes.set_xlabel(f"tokens read ({scale.unit})")
    axes.set_ylabel(label)
    room(axes, [0.0, longest / scale.divisor])
    legend(axes, len(named))
    return figure
