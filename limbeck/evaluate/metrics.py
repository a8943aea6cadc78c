"""Scores with 95 % intervals, as pure functions of what was measured on P problems with N samples each.

Every interval is a bootstrap over problems (Efron and Tibshirani 1993, section 13.3, percentile method): problems are
drawn with replacement, the statistic is computed anew, and the interval lies between the 2.5 % and 97.5 % quantiles.
Samples of one problem stay together, because they are not independent. An interval always contains its value.

Where all problems score 0, or all score 1, every draw is the same and a bootstrap would claim certainty; the interval
is then the exact one of Clopper and Pearson (1934): 0 to 1 - (a/2)^(1/P), or (a/2)^(1/P) to 1, for a level of 1 - a.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
NUM_RESAMPLES = 2000
_CHUNK_ENTRIES = 4_000_000
"""Drawn indices held at once: 32 MB."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float
    reason: str = ""
    """Why the value is not a number; empty when it is one."""


def accuracy(right: ArrayLike, seed: int = 0) -> Interval:
    """Share of right outputs, each problem weighted equally; over N samples this is avg@N.

    Args:
      right: bool [P] or [P N].
      seed: of the bootstrap.
    """
    return share_interval(right, seed)


def avg_at_n(right: ArrayLike, num_samples: int, seed: int = 0) -> Interval:
    """Accuracy over the first `num_samples` samples of each problem.

    Args:
      right: bool [P N].
      num_samples: n, at most N.
      seed: of the bootstrap.
    Raises: ValueError when n is not between 1 and N. (Dividing by n where fewer samples exist would halve scores.)
    """
    table = _problems_by_samples(right)
    _refuse_more_than(num_samples, table.shape[1], "n of avg@n")
    return share_interval(table[:, :num_samples], seed)


def pass_at_k(right: ArrayLike, k: int, seed: int = 0) -> Interval:
    """Share of problems that k draws without replacement from the N samples solve: mean of 1 - C(N-c, k) / C(N, k).

    Args:
      right: bool [P N]; c is the number of right samples of a problem.
      k: at most N.
      seed: of the bootstrap.
    Raises: ValueError when k is not between 1 and N.
    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1, in exact integers.
    """
    table = _problems_by_samples(right)
    n = table.shape[1]
    _refuse_more_than(k, n, "k of pass@k")
    by_count = np.array([1 - math.comb(n - count, k) / math.comb(n, k) for count in range(n + 1)])
    return share_interval(by_count[table.astype(np.int64).sum(1)], seed)


def stop_rate(stopped: ArrayLike, seed: int = 0) -> Interval:
    """Share of outputs that end by themselves, before the limit of new tokens. `stopped` is bool [P] or [P N]."""
    return share_interval(stopped, seed)


def mean_output_tokens(output_tokens: ArrayLike, seed: int = 0) -> Interval:
    """Mean length of an output in tokens, the stop token counted. `output_tokens` is int [P] or [P N]."""
    return mean_interval(_problems_by_samples(output_tokens), seed)


def share_interval(values: ArrayLike, seed: int = 0) -> Interval:
    """`mean_interval` of values in [0, 1], with the exact interval where all of them are 0 or all are 1.

    Args:
      values: [P] or [P N], bool or number.
      seed: of the bootstrap.
    Source: Clopper and Pearson 1934; for values between 0 and 1 it is conservative.
    """
    scores = _problems_by_samples(values).mean(1)
    bound = _unseen(len(scores))
    if not scores.any():
        return Interval(0.0, 0.0, bound)
    return Interval(1.0, 1 - bound, 1.0) if (scores == 1).all() else mean_interval(values, seed)


def paired_difference(scores: ArrayLike, other: ArrayLike, seed: int = 0) -> Interval:
    """Mean of scores - other over the same problems, each in [0, 1], with its bootstrap interval.

    Where no problem tells the two apart, the interval has the exact bound on the share of problems that would.

    Args:
      scores: [P] or [P N]; other: [P] or [P M], of the same problems in the same order.
      seed: of the bootstrap.
    Raises: ValueError when the numbers of problems differ.
    """
    ours, theirs = _paired(scores, other)
    if (ours == theirs).all():
        bound = _unseen(len(ours))
        return Interval(0.0, -bound, bound)
    return mean_interval(ours - theirs, seed)


def mean_interval(values: ArrayLike, seed: int = 0) -> Interval:
    """Mean over problems of the mean over samples, with its bootstrap interval.

    Args:
      values: [P] or [P N], bool or number, finite.
      seed: of the bootstrap.
    Raises: ValueError for no problems, no samples, or values that are not finite.
    """
    scores = _problems_by_samples(values).mean(1)
    means = np.concatenate([scores[index].mean(1) for index in resamples(len(scores), seed)])
    return around(float(scores.mean()), means)


def ratio_interval(sums: ArrayLike, counts: ArrayLike, seed: int = 0) -> Interval:
    """Sum over sum, such as nats over tokens, with its bootstrap interval over the parts they were summed in.

    Args:
      sums: [P], finite.
      counts: [P], above 0.
      seed: of the bootstrap.
    Raises: ValueError when the numbers of parts differ or a count is not above 0.
    """
    above, below = _problems_by_samples(sums)[:, 0], _problems_by_samples(counts)[:, 0]
    if len(above) != len(below) or not (below > 0).all():
        raise ValueError(f"expected a count above 0 for each of {len(above)} sums; found {len(below)}")
    ratios = np.concatenate([above[index].sum(1) / below[index].sum(1) for index in resamples(len(above), seed)])
    return around(float(above.sum() / below.sum()), ratios)


def paired_retention(scores: ArrayLike, scores_uncut: ArrayLike, seed: int = 0) -> Interval:
    """Retention mean(scores) / mean(scores_uncut), with a paired bootstrap: both runs keep the same drawn problems.

    Resamples where both means are 0 say nothing and are left out; where only the uncut mean is 0 the ratio is
    infinite, and so may be the upper end. Where the run scores 0, or no problem tells it from the uncut one, the bounds
    are the exact ones of `share_interval` and `paired_difference`, over the uncut mean.

    Args:
      scores: [P] or [P N], the score of each problem under the run in question.
      scores_uncut: [P] or [P M], of the same problems in the same order under the uncut run.
      seed: of the bootstrap.
    Returns: NaN with a reason when the uncut run scores 0.
    Raises: ValueError when the numbers of problems differ.
    """
    ours, uncut = _paired(scores, scores_uncut)
    if uncut.mean() == 0:
        return Interval(math.nan, math.nan, math.nan, "the uncut run scores 0, so there is nothing to retain")
    bound = _unseen(len(ours)) / float(uncut.mean())
    if not ours.any():
        return Interval(0.0, 0.0, bound)
    if (ours == uncut).all():
        return Interval(1.0, max(0.0, 1 - bound), 1 + bound)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.concatenate([ours[index].mean(1) / uncut[index].mean(1) for index in resamples(len(ours), seed)])
    return around(float(ours.mean() / uncut.mean()), ratios[~np.isnan(ratios)])


def paired_gain(scores: ArrayLike, scores_uncut: ArrayLike, scores_base: ArrayLike, seed: int = 0) -> Interval:
    """Gain kept (mean(scores) - base) / (uncut - base), with a paired bootstrap: all three share the drawn problems.

    1 is what whole traces brought over the base student, 0 nothing, and below 0 the training took away what was there.
    Resamples in which whole traces gain nothing say nothing of a share of it and are left out.

    Args:
      scores: [P] or [P N], the score of each problem under the run in question.
      scores_uncut: the same problems in the same order under the uncut run.
      scores_base: the same under the student before training.
      seed: of the bootstrap.
    Returns: NaN with a reason when the 95 % interval of the uncut run's own gain reaches down to 0.
    Raises: ValueError when the numbers of problems differ.
    """
    ours, uncut, base = (_problems_by_samples(values).mean(1) for values in (scores, scores_uncut, scores_base))
    if not len(ours) == len(uncut) == len(base):
        raise ValueError(f"gain kept pairs problems: found {len(ours)}, {len(uncut)} and {len(base)} scores")
    kept, whole = ours - base, uncut - base
    if mean_interval(whole, seed).low <= 0:
        reason = "what whole traces gain over the base student cannot be told from 0 on these problems"
        return Interval(math.nan, math.nan, math.nan, reason)
    drawn = [(kept[index].mean(1), whole[index].mean(1)) for index in resamples(len(ours), seed)]
    above, below = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    return around(float(kept.mean() / whole.mean()), above[below > 0] / below[below > 0])


def resamples(num_problems: int, seed: int) -> Iterator[np.ndarray]:
    """int64 [R' P] chunks of NUM_RESAMPLES draws with replacement."""
    rng = np.random.default_rng(seed)
    chunk = max(1, min(NUM_RESAMPLES, _CHUNK_ENTRIES // num_problems))
    for start in range(0, NUM_RESAMPLES, chunk):
        yield rng.integers(0, num_problems, (min(chunk, NUM_RESAMPLES - start), num_problems))


def around(value: float, statistics: np.ndarray) -> Interval:
    """The value with the percentile interval of the statistic's resampled values [R]."""
    # inverted_cdf takes an observed value and never interpolates, which would make NaN of an infinite end.
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(statistics, [tail, 1 - tail], method="inverted_cdf")
    return Interval(value, min(float(low), value), max(float(high), value))


def _unseen(num_problems: int) -> float:
    """Most of the share of something that none of so many problems shows."""
    return 1 - ((1 - LEVEL) / 2) ** (1 / num_problems)


def _paired(scores: ArrayLike, other: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = _problems_by_samples(scores).mean(1), _problems_by_samples(other).mean(1)
    if len(ours) != len(theirs):
        raise ValueError(f"a comparison pairs problems: found {len(ours)} scores and {len(theirs)} of the other run")
    return ours, theirs


def _problems_by_samples(values: ArrayLike) -> np.ndarray:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"expected values of shape [P] or [P N], none of them 0; found {np.shape(values)}")
    if not np.isfinite(table).all():
        raise ValueError("expected finite values; found NaN or infinity")
    return table


def _refuse_more_than(wanted: int, num_samples: int, name: str) -> None:
    if not 1 <= wanted <= num_samples:
        raise ValueError(f"{name} is {wanted}; expected 1 to {num_samples}, the number of samples of each problem")
