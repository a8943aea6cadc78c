"""Scores with intervals: the mean over problems, and a percentile bootstrap that resamples problems.

A problem is the unit: samples of one problem are not independent, so they are averaged first and only problems are
drawn. A retention is the ratio of two means over the same problems, and its bootstrap draws the same problems for
both, so what makes a problem hard cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from limbeck.errors import ShapeError

NUM_RESAMPLES = 2000
_BLOCK = 250
"""Resamples drawn at a time: bounds the memory."""


class Interval(NamedTuple):
    """A value and its 95 % interval; all NaN when the value is not defined."""

    value: float
    low: float
    high: float


def mean_interval(per_problem: Sequence[float] | np.ndarray, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean over problems with its bootstrap interval.

    Args:
      per_problem: [P] one number a problem (its mean over samples).
      seed: of the resampling.
      level: coverage.
    """
    values = _column(per_problem)
    return _bootstrap(values[:, None], lambda means: means[..., 0], seed, level)


def paired_retention(
    per_problem: Sequence[float] | np.ndarray,
    per_problem_uncut: Sequence[float] | np.ndarray,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """mean(a) / mean(b) over the same problems, in the same order; NaN where the uncut run scores 0.

    Resamples in which the uncut run scores 0 are left out of the interval; when they are more than the interval leaves
    out on either side, the interval is unbounded above and `high` is infinite.

    Raises: ShapeError when the two have different lengths.
    """
    a, b = _column(per_problem), _column(per_problem_uncut)
    if len(a) != len(b):
        raise ShapeError(f"retention: {len(a)} problems against {len(b)}; both runs must answer the same problems.")
    if b.mean() == 0:
        return Interval(float("nan"), float("nan"), float("nan"))

    def ratio(means: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(means[..., 1] > 0, means[..., 0] / means[..., 1], np.inf)

    return _bootstrap(np.stack([a, b], axis=1), ratio, seed, level)


def pass_at_k(num_right: int, num_samples: int, k: int) -> float:
    """Probability that at least one of k samples, drawn without replacement from n, is right: 1 - C(n-c, k) / C(n, k).

    Args:
      num_right: c, right samples of the problem.
      num_samples: n.
      k: 1 <= k <= n.
    Raises: ShapeError when k is out of range.
    Source: Chen et al., arXiv 2107.03374, eq. 1.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ShapeError(f"pass@k: k {k} and {num_right} right of {num_samples} samples; expected 1 <= k <= samples.")
    if num_samples - num_right < k:
        return 1.0
    terms = 1.0 - k / np.arange(num_samples - num_right + 1, num_samples + 1)
    return float(1.0 - np.prod(terms))


def _column(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ShapeError(f"metrics: expected one number a problem and at least one problem; found shape {array.shape}.")
    return array


def _bootstrap(
    columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int, level: float
) -> Interval:
    """`statistic` of the column means [..., C], of the data and of resampled problems."""
    rng = np.random.default_rng(seed)
    count = len(columns)
    draws = [
        statistic(columns[rng.integers(0, count, size=(_BLOCK, count))].mean(axis=1))
        for _ in range(NUM_RESAMPLES // _BLOCK)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail], method="inverted_cdf")
    value = float(statistic(columns.mean(axis=0)))
    return Interval(value, min(float(low), value), max(float(high), value))
