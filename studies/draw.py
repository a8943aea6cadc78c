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


def medians(result: Mapping[str, Mapping[str, Sequence[float]]], never: float, path: Path) -> None:
    """One panel a problem: median, lower and upper end of every method; what never arrives stands at `never`."""
    columns = min(4, len(result))
    rows = math.ceil(len(result) / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(3.2 * columns, 2.8 * rows), squeeze=False, sharey=True)
    for panel in grid.flat[len(result) :]:
        panel.set_visible(False)
    for panel, (problem, methods) in zip(grid.flat, result.items(), strict=False):
        for i, (middle, low, high) in enumerate(methods.values()):
            arrives = math.isfinite(middle)
            panel.plot([low, min(high, never)], [i, i], "-", color="C0" if arrives else "none")
            panel.plot(min(middle, never), i, "o" if arrives else "x", color="C0" if arrives else "C3")
        panel.set(title=problem, xscale="log", xlim=(5, 1.4 * never), yticks=range(len(methods)))
        panel.set_yticklabels(list(methods))
    figure.supxlabel("gradients until the target (median, 95 %); a cross: never")
    figure.tight_layout()
    save_figure(figure, path)


def held_out_losses(result: Mapping[str, Any], every: int, path: Path) -> None:
    """The held-out loss of every run of every method against steps."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for i, (method, runs) in enumerate(result.items()):
        for j, found in enumerate(runs):
            steps = [every * k for k in range(len(found["losses"]))]
            axes.plot(steps, found["losses"], f"C{i}.-", label=method if j == 0 else None, linewidth=1.2)
    axes.set(xlabel="step", ylabel="held-out loss")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def reliability(probabilities: Mapping[str, Tensor], labels: Tensor, path: Path, num_bins: int = 10) -> None:
    """The share of positive labels against the mean probability in bins of equal width."""
    figure, axes = pyplot.subplots(figsize=(5, 5))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    for name, values in probabilities.items():
        bins = (values * num_bins).long().clamp(max=num_bins - 1)
        counts = torch.bincount(bins, minlength=num_bins)
        filled = counts > 0
        means = [torch.bincount(bins, of, minlength=num_bins)[filled] / counts[filled] for of in (values, labels)]
        axes.plot(*means, "o-", label=name, markersize=4, linewidth=1)
    axes.set(xlabel="probability", ylabel="share of clicks", xlim=(0, 1), ylim=(0, 1))
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
