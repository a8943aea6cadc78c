"""Reciprocal rank, average precision and recall, request by request: pure functions, in the terms of TREC.

Of equal scores the negatives count as first, so a scorer that says the same of all candidates gets the least it can,
and nothing depends on the order of the rows. (trec_eval breaks ties by the name of the document.) Requests without a
positive have none of these and are left out. Means and their intervals are `metrics.mean_of_requests`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

RequestMeasure = Callable[[np.ndarray, np.ndarray], float]
"""(scores float [N], labels bool [N]) of the candidates of a request -> its value, or NaN."""


def positive_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int [P], rising: the rank of each positive, from 1, behind all negatives of its score or a better one."""
    positives, negatives = np.sort(scores[labels])[::-1], np.sort(scores[~labels])
    above = len(negatives) - np.searchsorted(negatives, positives, side="left")
    return above + np.arange(1, len(positives) + 1)


def reciprocal_rank(scores: np.ndarray, labels: np.ndarray) -> float:
    """1 / rank of the first positive; its mean is MRR."""
    return float(1 / positive_ranks(scores, labels)[0]) if labels.any() else math.nan


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the positives of the precision at their ranks; its mean is MAP."""
    if not labels.any():
        return math.nan
    ranks = positive_ranks(scores, labels)
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


def recall(k: int) -> RequestMeasure:
    """Share of the positives among the first k candidates."""

    def measure(scores: np.ndarray, labels: np.ndarray) -> float:
        return float(np.mean(positive_ranks(scores, labels) <= k)) if labels.any() else math.nan

    return measure
