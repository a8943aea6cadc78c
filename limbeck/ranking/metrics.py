"""How well scores rank and how far they can be trusted, each with a 95 % interval: pure functions of arrays.

Rows of one request share a member, a moment and a prefix, so they are not independent. Every interval therefore draws
whole requests with replacement (percentile bootstrap, as in evaluate/metrics, exact where all requests score 0 or all
score 1); it is right whether or not the rows of a request are correlated, while intervals from drawn rows are too
narrow where they are. All functions take

    scores    float [N], higher means more likely; probabilities where a metric says so
    labels    bool [N], or grades of at least 0 where a metric says so
    requests  int [N], which request a row belongs to; any numbers
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike

from limbeck.evaluate.metrics import (
    Interval,
    around,
    mean_interval,
    paired_difference,
    ratio_interval,
    resamples,
    share_interval,
)
from limbeck.ranking.auc import auc, weighted_auc
from limbeck.ranking.retrieval import RequestMeasure

_ENTRIES = 4_000_000
"""Weights of rows held at once: 32 MB."""
_MIN_PROBABILITY = 1e-12


def auc_interval(scores: ArrayLike, labels: ArrayLike, requests: ArrayLike, seed: int = 0) -> Interval:
    """Area under the ROC curve over all rows: P(score of a positive > score of a negative), ties counting one half.

    Returns: NaN with a reason when the labels are all the same. Where no pair of rows is out of order, or all are, the
      exact interval of `share_interval` over the fewest of requests, positives and negatives.
    """
    scores, labels, groups = _rows(scores, labels, requests)
    if labels.all() or not labels.any():
        return _undefined("all labels are the same, so there is nothing to tell apart")
    value = auc(scores, labels)
    if value in (0.0, 1.0):
        return share_interval(np.full(min(labels.sum(), (~labels).sum(), groups.max() + 1), value))
    statistics = _resampled(groups, lambda weights: weighted_auc(scores, labels, weights), seed)
    return around(value, statistics)


def request_auc(scores: ArrayLike, labels: ArrayLike, requests: ArrayLike, seed: int = 0) -> Interval:
    """Mean AUC of the requests that have labels of both kinds; the others say nothing and are left out."""
    scores, labels, groups = _rows(scores, labels, requests)
    values = [auc(scores[rows], labels[rows]) for rows in _members(groups)]
    return _share_of_defined(values, seed, "no request has labels of both kinds")


def ndcg(scores: ArrayLike, labels: ArrayLike, requests: ArrayLike, k: int, seed: int = 0) -> Interval:
    """Mean over requests of DCG@k / ideal DCG@k with gain = label or grade and discount 1 / log2(rank + 1).

    Equal scores share the mean gain of their group, which is the expectation over a random order of them (McSherry and
    Najork 2008), so that no metric depends on the order of the rows. Requests without a positive are left out.

    Args:
      labels: bool or grade [N], at least 0.
      k: ranks that count, at least 1; a request with fewer candidates is ranked as far as it goes.
    Raises: ValueError when k is below 1.
    """
    values = ndcg_of_requests(scores, labels, requests, k)
    return _share_of_defined(values, seed, "no request has a positive label and a second candidate")


def ndcg_of_requests(scores: ArrayLike, labels: ArrayLike, requests: ArrayLike, k: int) -> list[float]:
    """What `ndcg` is the mean of, request by request in the order of their numbers; NaN where it is not defined."""
    if k < 1:
        raise ValueError(f"k of NDCG@k is {k}; expected at least 1")
    scores, _, groups = _rows(scores, labels, requests)
    grades = np.asarray(labels, np.float64)
    return [_ndcg(scores[rows], grades[rows], k) for rows in _members(groups)]


def mean_of_requests(
    measure: RequestMeasure, scores: ArrayLike, labels: ArrayLike, requests: ArrayLike, seed: int = 0
) -> Interval:
    """Mean over requests of a measure of `retrieval`, over those where it is defined."""
    values = of_requests(measure, scores, labels, requests)
    return _share_of_defined(values, seed, "no request has a positive label")


def of_requests(measure: RequestMeasure, scores: ArrayLike, labels: ArrayLike, requests: ArrayLike) -> list[float]:
    """A measure of every request, in the order of their numbers; NaN where it is not defined."""
    scores, labels, groups = _rows(scores, labels, requests)
    return [measure(scores[rows], labels[rows]) for rows in _members(groups)]


def difference_of_requests(values: list[float], other: list[float], seed: int = 0) -> Interval:
    """Mean difference of two scorings' measures over the requests where both are defined, paired by request."""
    ours, theirs = np.array(values), np.array(other)
    known = ~(np.isnan(ours) | np.isnan(theirs))
    return paired_difference(ours[known], theirs[known], seed) if known.any() else _undefined("no request has a value")


def log_loss(probabilities: ArrayLike, labels: ArrayLike, requests: ArrayLike, seed: int = 0) -> Interval:
    """Mean of -log P(label) in nats a row; probabilities are held above 1e-12."""
    probabilities, labels, groups = _probability_rows(probabilities, labels, requests)
    right = np.where(labels, probabilities, 1 - probabilities)
    losses = -np.log(np.maximum(right, _MIN_PROBABILITY))
    return ratio_interval(np.bincount(groups, losses), np.bincount(groups), seed)


def calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, requests: ArrayLike, num_bins: int = 10, seed: int = 0
) -> Interval:
    """Expected calibration error: sum over bins of |sum of (label - probability)| / N, bins of equal width in [0, 1].

    The resampled values lie above the value, since drawing adds noise to every bin before its absolute value is taken;
    the interval is therefore that of the estimate, not of an error that a longer test would find.

    Source: Naeini, Cooper and Hauskrecht 2015.
    """
    probabilities, labels, groups = _probability_rows(probabilities, labels, requests)
    bins = np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)
    gaps = np.bincount(groups * num_bins + bins, labels - probabilities, (groups.max() + 1) * num_bins)
    gaps, counts = gaps.reshape(-1, num_bins), np.bincount(groups)
    value = float(np.abs(gaps.sum(0)).sum() / counts.sum())
    drawn = np.concatenate(
        [np.abs(times @ gaps).sum(1) / (times @ counts) for times in _multiplicities(len(counts), seed)]
    )
    return around(value, drawn)


def auc_difference(
    scores: ArrayLike, other_scores: ArrayLike, labels: ArrayLike, requests: ArrayLike, seed: int = 0
) -> Interval:
    """AUC(scores) - AUC(other_scores) on the same rows, both computed on the same drawn requests.

    Returns: NaN with a reason when the labels are all the same.
    """
    scores, labels, groups = _rows(scores, labels, requests)
    other, _, _ = _rows(other_scores, labels, requests)
    if labels.all() or not labels.any():
        return _undefined("all labels are the same, so there is nothing to tell apart")

    def difference(weights: np.ndarray) -> np.ndarray:
        return weighted_auc(scores, labels, weights) - weighted_auc(other, labels, weights)

    return around(auc(scores, labels) - auc(other, labels), _resampled(groups, difference, seed))


def kendall_tau(scores: ArrayLike, other_scores: ArrayLike, requests: ArrayLike, seed: int = 0) -> Interval:
    """Mean Kendall tau-b between two scorings of the candidates of a request: 1 keeps the order, -1 turns it round.

    Requests where one of the two scorings ties everything have no order and are left out.

    Source: Kendall 1945.
    """
    scores, other, groups = _score_pairs(scores, other_scores, requests)
    values = [_tau(scores[rows], other[rows]) for rows in _members(groups)]
    return _mean_of_defined(values, seed, "no request has an order under both scorings")


def top_k_churn(scores: ArrayLike, other_scores: ArrayLike, requests: ArrayLike, k: int, seed: int = 0) -> Interval:
    """Mean share of a request's best k that another scoring replaces, 0 to 1; of equal scores the earlier row is first.

    Requests with k candidates or fewer, whose best k cannot change, are left out.

    Raises: ValueError when k is below 1.
    """
    if k < 1:
        raise ValueError(f"k of the churn is {k}; expected at least 1")
    scores, other, groups = _score_pairs(scores, other_scores, requests)
    values = [_churn(scores[rows], other[rows], k) for rows in _members(groups)]
    return _share_of_defined(values, seed, f"no request has more than {k} candidates")


def _ndcg(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    if not labels.any() or len(labels) < 2:
        return math.nan
    _, tie, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    gains = (np.bincount(tie, labels) / counts)[np.sort(tie)]
    discounts = 1 / np.log2(np.arange(2, min(k, len(scores)) + 2))
    best = np.sort(labels)[::-1]
    return float(gains[:k] @ discounts / (best[:k] @ discounts))


def _tau(scores: np.ndarray, other: np.ndarray) -> float:
    signs, other_signs = (np.sign(x[:, None] - x[None, :]) for x in (scores, other))
    norm = math.sqrt(float((signs**2).sum()) * float((other_signs**2).sum()))
    return float((signs * other_signs).sum()) / norm if norm else math.nan


def _churn(scores: np.ndarray, other: np.ndarray, k: int) -> float:
    if len(scores) <= k:
        return math.nan
    best, other_best = (set(np.argsort(-x, kind="stable")[:k].tolist()) for x in (scores, other))
    return 1 - len(best & other_best) / k


def _share_of_defined(values: list[float], seed: int, otherwise: str) -> Interval:
    defined = np.array(values)[~np.isnan(values)]
    return share_interval(defined, seed) if len(defined) else _undefined(otherwise)


def _mean_of_defined(values: list[float], seed: int, otherwise: str) -> Interval:
    defined = np.array(values)[~np.isnan(values)]
    return mean_interval(defined, seed) if len(defined) else _undefined(otherwise)


def _undefined(reason: str) -> Interval:
    return Interval(math.nan, math.nan, math.nan, reason)


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """The rows of every request, in order."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.cumsum(np.bincount(groups))[:-1])


def _resampled(groups: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int) -> np.ndarray:
    """A statistic of row weights, float [R N] -> [R], over all draws; draws where it is undefined are left out."""
    num_requests = int(groups.max()) + 1
    chunk = max(1, _ENTRIES // len(groups))
    values = []
    for times in _multiplicities(num_requests, seed):
        values += [statistic(times[i : i + chunk][:, groups]) for i in range(0, len(times), chunk)]
    found = np.concatenate(values)
    return found[~np.isnan(found)]


def _multiplicities(num_requests: int, seed: int) -> Iterator[np.ndarray]:
    """How often each request is drawn: float [R' P] chunks."""
    for index in resamples(num_requests, seed):
        flat = index + num_requests * np.arange(len(index))[:, None]
        yield np.bincount(flat.ravel(), minlength=flat.size).reshape(index.shape).astype(np.float64)


def _rows(scores: ArrayLike, labels: ArrayLike, requests: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, labels and requests numbered from 0, checked."""
    values, truths, names = np.asarray(scores, np.float64), np.asarray(labels), np.asarray(requests)
    if values.ndim != 1 or len(values) == 0 or values.shape != truths.shape or values.shape != names.shape:
        raise ValueError(
            f"expected scores, labels and requests of one shape [N], N at least 1; found {values.shape}, "
            f"{truths.shape} and {names.shape}"
        )
    if np.isnan(values).any():
        raise ValueError("expected scores that are numbers; found NaN")
    return values, truths.astype(bool), np.unique(names, return_inverse=True)[1]


def _probability_rows(
    probabilities: ArrayLike, labels: ArrayLike, requests: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values, truths, groups = _rows(probabilities, labels, requests)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"expected probabilities in [0, 1]; found {values.min()} to {values.max()}")
    return values, truths, groups


def _score_pairs(
    scores: ArrayLike, other_scores: ArrayLike, requests: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels = np.zeros(np.shape(scores), dtype=bool)
    values, _, groups = _rows(scores, labels, requests)
    return values, _rows(other_scores, labels, requests)[0], groups
