"""Ranking metrics: equal to their definitions, ties included; intervals that cover; tests with the promised error."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.ranking.auc import auc, delong_test, expected_auc, weighted_auc
from limbeck.ranking.metrics import (
    auc_difference,
    auc_interval,
    calibration_error,
    kendall_tau,
    log_loss,
    ndcg,
    request_auc,
    top_k_churn,
)


@st.composite
def scored(draw: st.DrawFn, columns: int = 1) -> tuple[np.ndarray, ...]:
    """Scores with many ties (one array a column) and labels of both kinds."""
    size = draw(st.integers(2, 12))
    values = [np.array(draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size)), float) for _ in range(columns)]
    labels = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    labels[0], labels[1] = True, False
    return *values, labels


def pair_value(higher: float, lower: float) -> float:
    return 1.0 if higher > lower else 0.5 if higher == lower else 0.0


def auc_by_pairs(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    pairs = [(i, j) for i, j in itertools.permutations(range(len(scores)), 2) if labels[i] and not labels[j]]
    weight = np.array([weights[i] * weights[j] for i, j in pairs])
    wins = np.array([pair_value(scores[i], scores[j]) for i, j in pairs])
    return float(weight @ wins / weight.sum()) if weight.sum() else math.nan


@given(scored(), st.data())
@settings(max_examples=80)
def test_auc_is_the_share_of_pairs_in_order(case: tuple[np.ndarray, ...], data: st.DataObject) -> None:
    scores, labels = case
    assert auc(scores, labels) == pytest.approx(auc_by_pairs(scores, labels, np.ones(len(scores))), abs=1e-12)
    drawn = data.draw(st.lists(st.integers(0, 3), min_size=len(scores), max_size=len(scores)))
    weights = np.array(drawn, dtype=float)
    found = weighted_auc(scores, labels, np.stack([weights, np.ones(len(scores))]))
    expected = auc_by_pairs(scores, labels, weights)
    assert math.isnan(found[0]) if math.isnan(expected) else found[0] == pytest.approx(expected, abs=1e-12)
    # A weight is a number of copies.
    copies = np.repeat(np.arange(len(scores)), weights.astype(int))
    if not math.isnan(expected):
        assert found[0] == pytest.approx(auc(scores[copies], labels[copies]), abs=1e-12)
    assert auc(-scores, labels) == pytest.approx(1 - auc(scores, labels), abs=1e-12)
    assert auc(np.exp(scores) * 3, labels) == pytest.approx(auc(scores, labels), abs=1e-12)


def test_hand_cases_with_ties() -> None:
    labels = np.array([True, False, True, False])
    assert auc(np.array([3.0, 2, 1, 0]), labels) == 0.75
    assert auc(np.array([1.0, 1, 1, 1]), labels) == 0.5
    assert auc(np.array([2.0, 1, 1, 0]), labels) == 0.875
    assert math.isnan(auc(np.array([1.0, 2]), np.array([True, True])))
    one = np.zeros(4, int)
    # Ranked 1, 0, 1, 0 and the best order is 1, 1, 0, 0.
    expected = (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert ndcg([3, 2, 1, 0], labels, one, 4).value == pytest.approx(expected)
    assert ndcg([3, 2, 1, 0], labels, one, 10).value == pytest.approx(expected)
    assert ndcg([3, 2, 1, 0], labels, one, 1).value == 1.0
    # All tied: each place holds half a positive.
    assert ndcg([1, 1, 1, 1], labels, one, 1).value == 0.5
    assert log_loss([0.5, 0.25], [True, False], [0, 1]).value == pytest.approx((math.log(2) - math.log(0.75)) / 2)
    # Bins [0.2, 0.3) and [0.9, 1]: gaps of 1 - 0.25 and of 0 - 0.9 - 1.
    assert calibration_error([0.25, 0.9, 1.0], [True, False, False], [0, 0, 0]).value == pytest.approx(2.65 / 3)
    assert kendall_tau([1, 2, 3], [1, 3, 2], [0, 0, 0]).value == pytest.approx(1 / 3)
    # One tie on one side: 2 pairs in order of 3 and 2 ordered ones.
    assert kendall_tau([1, 2, 3], [1, 2, 2], [0, 0, 0]).value == pytest.approx(2 / math.sqrt(6))
    assert top_k_churn([4, 3, 2, 1], [4, 1, 2, 3], [0] * 4, 2).value == 0.5
    assert top_k_churn([4, 3, 2, 1], [4, 3, 1, 2], [0] * 4, 2).value == 0.0


@given(scored(columns=2))
@settings(max_examples=60)
def test_ndcg_is_the_mean_over_all_orders_of_ties(case: tuple[np.ndarray, ...]) -> None:
    scores, _, labels = case
    scores, labels = scores[:6], labels[:6]
    ranked = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    discounts = 1 / np.log2(np.arange(2, 5))
    best = np.sort(labels.astype(float))[::-1][:3]
    values = [labels[list(order)][:3] @ discounts[: len(order)] / (best @ discounts[: len(best)]) for order in ranked]
    found = ndcg(scores, labels, np.zeros(len(scores)), 3).value
    assert found == pytest.approx(np.mean(values), abs=1e-12)


@given(scored(columns=2))
@settings(max_examples=60)
def test_delong_is_the_jackknife_of_its_definition(case: tuple[np.ndarray, ...]) -> None:
    scores, other, labels = case
    scores, other = np.append(scores, [0.5, -0.5]), np.append(other, [-0.5, 0.5])
    labels = np.append(labels, [True, False])
    positives, negatives = np.flatnonzero(labels), np.flatnonzero(~labels)
    wins = np.array([[pair_value(scores[i], scores[j]) for j in negatives] for i in positives])
    wins -= [[pair_value(other[i], other[j]) for j in negatives] for i in positives]
    variance = wins.mean(1).var(ddof=1) / len(positives) + wins.mean(0).var(ddof=1) / len(negatives)
    found = delong_test(scores, other, labels)
    assert found.difference == pytest.approx(auc(scores, labels) - auc(other, labels), abs=1e-12)
    assert found.standard_error == pytest.approx(math.sqrt(variance), abs=1e-9)
    mirrored = delong_test(other, scores, labels)
    assert mirrored.p_value == pytest.approx(found.p_value, abs=1e-9)
    assert delong_test(scores, scores, labels) == (0.0, 0.0, 1.0)


def test_delong_needs_two_of_each() -> None:
    with pytest.raises(ValueError, match="1 positive, 2 negative"):
        delong_test(np.arange(3.0), np.arange(3.0), np.array([True, False, False]))


def test_expected_auc_is_what_drawn_labels_give() -> None:
    rng = np.random.default_rng(0)
    p = np.round(rng.random(300), 1)
    drawn = [auc(p, rng.random(300) < p) for _ in range(400)]
    assert expected_auc(p) == pytest.approx(np.mean(drawn), abs=3 * np.std(drawn) / 20 + 1e-4)
    assert expected_auc(np.array([0.3, 0.3, 0.3])) == pytest.approx(0.5)
    assert expected_auc(np.array([0.0, 1.0, 1.0])) == 1.0
    assert math.isnan(expected_auc(np.array([0.0, 0.0])))


@given(st.lists(st.sampled_from([0.1, 0.5, 0.8]), min_size=2, max_size=5))
@settings(max_examples=30)
def test_expected_auc_by_enumeration(probabilities: list[float]) -> None:
    p = np.array(probabilities)
    pairs = [(p[i] * (1 - p[j]), pair_value(p[i], p[j])) for i, j in itertools.permutations(range(len(p)), 2)]
    assert expected_auc(p) == pytest.approx(sum(w * v for w, v in pairs) / sum(w for w, _ in pairs), abs=1e-12)


def simulated(rng: np.random.Generator, num_requests: int, size: int = 5) -> tuple[np.ndarray, ...]:
    """Two scorings, true probabilities, labels and requests; a request has an effect that all of its rows share."""
    requests = np.repeat(np.arange(num_requests), size)
    member = np.repeat(rng.normal(size=num_requests) * 1.5, size)
    signal = rng.normal(size=len(requests))
    probabilities = 1 / (1 + np.exp(-(member + signal)))
    labels = rng.random(len(requests)) < probabilities
    noisy = member + signal + rng.normal(size=len(requests))
    worse = member + signal + rng.normal(size=len(requests)) * 1.5
    return noisy, worse, probabilities, labels, requests


def truths() -> dict[str, float]:
    noisy, worse, p, labels, requests = simulated(np.random.default_rng(99), 20_000)
    few = slice(0, 20_000)
    return {
        "auc": auc(noisy, labels),
        "difference": auc(noisy, labels) - auc(worse, labels),
        "request_auc": request_auc(noisy[few], labels[few], requests[few]).value,
        "ndcg": ndcg(noisy[few], labels[few], requests[few], 3).value,
        "log_loss": float(-np.log(np.where(labels, p, 1 - p)).mean()),
        "tau": kendall_tau(noisy[few], worse[few], requests[few]).value,
    }


def test_intervals_cover_the_truth() -> None:
    truth = truths()
    hits = dict.fromkeys(truth, 0)
    trials = 40
    for trial in range(trials):
        noisy, worse, p, labels, requests = simulated(np.random.default_rng(trial), 60)
        found = {
            "auc": auc_interval(noisy, labels, requests, trial),
            "difference": auc_difference(noisy, worse, labels, requests, trial),
            "request_auc": request_auc(noisy, labels, requests, trial),
            "ndcg": ndcg(noisy, labels, requests, 3, trial),
            "log_loss": log_loss(p, labels, requests, trial),
            "tau": kendall_tau(noisy, worse, requests, trial),
        }
        for name, interval in found.items():
            assert interval.low <= interval.value <= interval.high
            hits[name] += interval.low <= truth[name] <= interval.high
    # Of 40 intervals at 95 %, 33 or fewer cover with probability 0.3 %.
    assert all(count >= 34 for count in hits.values()), hits


def test_delong_rejects_equal_scorings_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    rejected = 0
    for _ in range(400):
        signal = rng.normal(size=120)
        labels = rng.random(120) < 1 / (1 + np.exp(-signal))
        one, other = signal + rng.normal(size=120), signal + rng.normal(size=120)
        rejected += delong_test(one, other, labels).p_value < 0.05
    # 20 expected; more than 34 or fewer than 8 have a probability of 0.2 %.
    assert 8 <= rejected <= 34


def test_rows_of_a_request_are_drawn_together() -> None:
    rng = np.random.default_rng(1)
    scores, _, _, labels, requests = simulated(rng, 40)
    together = auc_interval(scores, labels, requests)
    apart = auc_interval(scores, labels, np.arange(len(scores)))
    copied = auc_interval(np.tile(scores, 3), np.tile(labels, 3), np.tile(requests, 3))
    assert together.high - together.low > apart.high - apart.low
    # Copies inside a request add nothing.
    assert (copied.low, copied.high) == pytest.approx((together.low, together.high))


def test_what_is_undefined_says_why() -> None:
    none = np.zeros(4, bool)
    for found in (
        auc_interval(np.arange(4.0), none, [0, 0, 1, 1]),
        auc_difference(np.arange(4.0), np.arange(4.0), none, [0, 0, 1, 1]),
        request_auc(np.arange(4.0), none, [0, 0, 1, 1]),
        ndcg(np.arange(4.0), none, [0, 0, 1, 1], 2),
        kendall_tau(np.ones(4), np.arange(4.0), [0, 0, 1, 1]),
        top_k_churn(np.arange(4.0), np.arange(4.0), [0, 0, 1, 1], 2),
    ):
        assert math.isnan(found.value) and found.reason
    with pytest.raises(ValueError, match="NaN"):
        auc_interval([math.nan, 1.0], [True, False], [0, 0])
    with pytest.raises(ValueError, match="one shape"):
        auc_interval([1.0, 2.0], [True, False], [0])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        log_loss([1.5, 0.5], [True, False], [0, 0])
    with pytest.raises(ValueError, match="k of NDCG"):
        ndcg([1.0], [True], [0], 0)


def test_requests_without_both_labels_are_left_out() -> None:
    scores, labels = np.array([1.0, 2, 3, 4]), np.array([False, True, True, True])
    assert request_auc(scores, labels, [7, 7, 3, 3]).value == 1.0


def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, other = rng.integers(0, 4, 9).astype(float), rng.integers(0, 4, 9).astype(float)
        expected = stats.kendalltau(one, other).statistic
        found = kendall_tau(one, other, np.zeros(9)).value
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_candidate_alone_has_one_order_and_no_ndcg():
    alone = ndcg(np.array([0.3, 0.9]), np.array([True, False]), np.array([0, 1]), k=5)
    assert math.isnan(alone.value) or alone.value is None
    both = ndcg(np.array([0.9, 0.3, 0.5]), np.array([True, False, True]), np.array([0, 0, 1]), k=5)
    assert both.value == 1.0
