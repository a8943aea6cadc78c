"""Straight lines through medians, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Line(NamedTuple):
    """y = intercept + slope x by least squares."""

    slope: float
    intercept: float
    r_squared: float
    """Share of the variance of y that the line explains; 1 where y does not vary."""


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The least-squares line through two or more points."""
    abscissa, ordinate = np.asarray(x, float), np.asarray(y, float)
    slope, intercept = np.polyfit(abscissa, ordinate, 1)
    residual = ordinate - intercept - slope * abscissa
    variation = float(((ordinate - ordinate.mean()) ** 2).sum())
    return Line(float(slope), float(intercept), 1 - float((residual**2).sum()) / variation if variation else 1.0)


def slope_interval(
    x: Sequence[float],
    groups: Sequence[Sequence[float]],
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """A 95 % bootstrap interval for the slope of the medians of `groups` over `x`.

    Args:
      groups: measured values at each x; resampled with replacement within each group.
      transform: applied to the medians before the fit, such as `numpy.log`.
    """
    generator = np.random.default_rng(seed)
    medians = np.stack(
        [np.median(generator.choice(np.asarray(group, float), (num_resamples, len(group))), axis=1) for group in groups]
    )
    abscissa = np.asarray(x, float) - np.mean(x)
    slopes = abscissa @ transform(medians) / (abscissa @ abscissa)
    low, high = np.quantile(slopes, [0.025, 0.975])
    return float(low), float(high)


def median_interval(values: Sequence[float], num_resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """A 95 % bootstrap interval for the median; infinite values (runs that never arrived) sort last."""
    generator = np.random.default_rng(seed)
    resampled = generator.choice(np.asarray(values, float), (num_resamples, len(values)))
    # An order statistic instead of an interpolated median, because the mean of two infinities' neighbours is no number.
    medians = np.sort(np.sort(resampled, axis=1)[:, (len(values) - 1) // 2])
    return float(medians[int(0.025 * num_resamples)]), float(medians[int(0.975 * num_resamples) - 1])


def lower_median(values: Sequence[float]) -> float:
    """The middle value, the lower of two; infinite when fewer than half are finite."""
    return float(np.sort(np.asarray(values, float))[(len(values) - 1) // 2])
