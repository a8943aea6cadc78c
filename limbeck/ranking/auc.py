"""The area under the ROC curve: exact with ties, under row weights, with DeLong's variance, and at its best."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class PairedTest(NamedTuple):
    """A difference of two AUCs on the same rows."""

    difference: float
    standard_error: float
    p_value: float
    """Two-sided, of the difference being 0."""


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """P(score of a positive > score of a negative) + P(equal) / 2; NaN when the labels are all the same.

    Args:
      scores: float [N].
      labels: bool [N].
    """
    return float(weighted_auc(scores, labels, np.ones((1, len(scores))))[0])


def weighted_auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC of every row of weights, as if each pair of a positive and a negative counted the product of their weights.

    Args:
      scores: float [N].
      labels: bool [N].
      weights: float [R N], at least 0.
    Returns: float [R]; NaN where one of the classes has no weight.
    """
    _, tie = np.unique(scores, return_inverse=True)
    order = np.argsort(tie, kind="stable")
    starts = np.flatnonzero(np.diff(tie[order], prepend=-1))
    ordered = weights[:, order]
    positive = np.add.reduceat(ordered * labels[order], starts, axis=1)
    negative = np.add.reduceat(ordered * ~labels[order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (positive * below).sum(1) / pairs, np.nan)


def delong_test(scores: np.ndarray, other_scores: np.ndarray, labels: np.ndarray) -> PairedTest:
    """AUC(scores) - AUC(other_scores), its standard error, and the p-value of the normal test of no difference.

    With V10 of a positive its mean win over the negatives, V01 of a negative its mean loss, and the same for the other
    scores, the variance is var(V10 - V10') / m + var(V01 - V01') / n for m positives and n negatives.

    Rows count as independent here; where the rows of a request are correlated, the error is too small and the bootstrap
    over requests (`metrics.auc_difference`) is the one to trust.

    Args:
      scores: float [N]; other_scores: float [N], of the same rows.
      labels: bool [N], with two of each kind at least.
    Raises: ValueError when there are fewer.
    Source: DeLong, DeLong and Clarke-Pearson 1988; midranks as in Sun and Xu 2014.
    """
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if min(positives, negatives) < 2:
        raise ValueError(f"DeLong's test needs 2 rows of each label; found {positives} positive, {negatives} negative")
    wins, losses = (a - b for a, b in zip(_components(scores, labels), _components(other_scores, labels), strict=True))
    difference = float(wins.mean())
    error = math.sqrt(wins.var(ddof=1) / positives + losses.var(ddof=1) / negatives)
    if error == 0:
        return PairedTest(difference, 0.0, 1.0 if difference == 0 else 0.0)
    return PairedTest(difference, error, math.erfc(abs(difference) / error / math.sqrt(2)))


def expected_auc(probabilities: np.ndarray) -> float:
    """The best AUC that any score can be expected to reach when row i is positive with probability p_i, independently.

    sum over i != j of p_i (1 - p_j) ([p_i > p_j] + [p_i = p_j] / 2) / sum over i != j of p_i (1 - p_j): the share of
    ordered pairs, expected over the labels, that the probabilities themselves put in the right order. No other score
    does better, by the Neyman-Pearson lemma.

    Args:
      probabilities: float [N] in [0, 1].
    Returns: NaN when no pair of a positive and a negative can occur.
    """
    p = np.sort(np.asarray(probabilities, np.float64))
    _, tie = np.unique(p, return_inverse=True)
    positive, negative = np.bincount(tie, p), np.bincount(tie, 1 - p)
    below = np.cumsum(negative) - negative
    self_pairs = np.bincount(tie, p * (1 - p))
    right = (positive * below).sum() + (positive * negative - self_pairs).sum() / 2
    pairs = p.sum() * (1 - p).sum() - (p * (1 - p)).sum()
    return float(right / pairs) if pairs > 0 else math.nan


def _components(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """V10 of the positives and V01 of the negatives."""
    positive, negative = scores[labels], scores[~labels]
    return _share_below(positive, negative), 1 - _share_below(negative, positive)


def _share_below(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Share of `among` that lies below each value, ties counting one half."""
    among = np.sort(among)
    return (np.searchsorted(among, values, "left") + np.searchsorted(among, values, "right")) / (2 * len(among))
