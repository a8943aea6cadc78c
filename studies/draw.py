"""The studies' pictures: escape times, convergence, loss curves, and paths over the contours of a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from studies.page import save_figure
from studies.problems import Problem

_PATHS = 3


def escape_times(result: Mapping[str, Any], path: Path) -> None:
    """Medians and quartiles against d, lines of the predicted slope through the first median, and the nulls."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, found in result["methods"].items():
        dims = [int(num_dims) for num_dims in found["medians"]]
        medians = _numbers(found["medians"].values())
        low, high = (_numbers(quartiles[side] for quartiles in found["quartiles"].values()) for side in (0, 1))
        (dots,) = axes.plot(dims, medians, "o", label=f"{name} (line: predicted slope)")
        axes.fill_between(dims, low, high, color=dots.get_color(), alpha=0.15)
        theory = [medians[0] + found["predicted_slope"] * math.log(num_dims / dims[0]) for num_dims in dims]
        axes.plot(dims, theory, "-", color=dots.get_color(), linewidth=1)
        if found["null_medians"]:
            null = _numbers(found["null_medians"].values())
            axes.plot(dims[: len(null)], null, "x:", color=dots.get_color(), linewidth=0.8)
    axes.set(xscale="log", xlabel="dimension d", ylabel="steps to leave the saddle (median, quartiles)")
    axes.set_ylim(bottom=0)
    axes.set_title("Dots: fixed noise energy. Crosses: fixed noise per coordinate.", fontsize=9)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def convergence(result: Mapping[str, Any], path: Path) -> None:
    """Median steps, and beside them median samples, against 1/eps for every schedule."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for panel, quantity, key in zip(panels, ("steps", "samples"), ("iterations", "samples"), strict=True):
        for schedule, found in result.items():
            exponent = found[f"{key}_exponent"]
            if exponent is None:
                continue
            medians = found[f"median_{quantity}"]
            inverse = [1 / float(eps) for eps in medians]
            panel.plot(inverse, list(medians.values()), "o-", label=f"{schedule}: exponent {exponent:.2f}")
        panel.set(xscale="log", yscale="log", xlabel="1 / eps", ylabel=f"median {quantity}")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.legend(fontsize=8)
    figure.suptitle("To a second-order point", fontsize=10)
    save_figure(figure, path)


def loss_curves(curves: Mapping[str, tuple[Sequence[float], Tensor]], target: float, path: Path) -> None:
    """Median loss after each step of every method, and the target."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, (losses, _) in curves.items():
        axes.plot(losses, label=name, linewidth=1.2)
    axes.axhline(target, color="grey", linewidth=0.8, linestyle=":", label="target")
    finite = [loss for losses, _ in curves.values() for loss in losses if math.isfinite(loss)]
    top, bottom = max(losses[0] for losses, _ in curves.values()), min(finite)
    span = top - bottom or 1.0
    # A method that diverges must not squash the others.
    axes.set_ylim(bottom - 0.05 * span, top + 0.3 * span)
    axes.set(xlabel="step", ylabel="median loss")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def paths(problem: Problem, points: Mapping[str, Tensor], path: Path) -> None:
    """Paths of every method `[steps, seeds, 2]` over the contours of the loss, one panel a method."""
    columns = min(3, len(points))
    rows = math.ceil(len(points) / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(4 * columns, 3.8 * rows), squeeze=False)
    extent = _extent(problem, list(points.values()))
    across = torch.linspace(-extent, extent, 160)
    heights = problem.loss(torch.stack(torch.meshgrid(across, across, indexing="xy"), -1))
    # Evenly spaced quantiles: equal steps of the loss would crowd where it is steep and leave the saddle empty.
    levels = torch.unique(heights.flatten().quantile(torch.linspace(0, 0.9, 24)))
    for panel in grid.flat[len(points) :]:
        panel.set_visible(False)
    for panel, (name, trail) in zip(grid.flat, points.items(), strict=False):
        panel.contour(across, across, heights, levels=levels, linewidths=0.6, cmap="Greys_r")
        for run in trail.clamp(-2 * extent, 2 * extent).unbind(1)[:_PATHS]:
            panel.plot(run[:, 0], run[:, 1], ".-", linewidth=0.9, markersize=3)
            panel.plot(*run[0], "k+", markersize=9)
        panel.set(title=name, xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
    figure.tight_layout()
    save_figure(figure, path)


def _extent(problem: Problem, trails: Sequence[Tensor]) -> float:
    """Half width of the picture: the known stationary points and the starts, with room around them."""
    facts = problem.facts()
    known = [float(point.abs().max()) for point in (*facts.saddles, *facts.minima)]
    started = [float(trail[0].abs().max()) for trail in trails]
    return 1.4 * (max([*known, *started]) or 1.0)


def _numbers(values: Any) -> list[float]:
    return [math.nan if value is None else value for value in values]
