"""Reciprocal rank, average precision and recall: by hand, against ir_measures, and pessimistic about ties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.ranking import metrics
from limbeck.ranking.retrieval import average_precision, positive_ranks, recall, reciprocal_rank

SCORES = np.array([0.9, 0.5, 0.4, 0.2, 0.1])
LABELS = np.array([False, True, False, True, False])


def test_values_by_hand():
    assert positive_ranks(SCORES, LABELS).tolist() == [2, 4]
    assert reciprocal_rank(SCORES, LABELS) == 1 / 2
    assert average_precision(SCORES, LABELS) == (1 / 2 + 2 / 4) / 2
    assert [recall(k)(SCORES, LABELS) for k in (1, 2, 3, 4)] == [0, 0.5, 0.5, 1]
    assert all(math.isnan(m(SCORES, np.zeros(5, dtype=bool))) for m in (reciprocal_rank, average_precision, recall(2)))


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12), st.randoms())
def test_ties_count_against_the_scorer_whatever_the_order_of_the_rows(pairs, rng):
    scores, labels = np.array([s for s, _ in pairs], dtype=float), np.array([y for _, y in pairs])
    order = np.array(rng.sample(range(len(pairs)), len(pairs)))
    worst = scores - 1e-6 * labels
    for measure in (reciprocal_rank, average_precision, recall(3)):
        value = measure(scores, labels)
        assert np.isnan(value) or value == measure(scores[order], labels[order]) == measure(worst, labels)


def test_means_over_requests_and_paired_differences():
    owner, labels = np.repeat([0, 1, 2], 5), np.concatenate([LABELS, LABELS, ~LABELS])
    scores = np.tile(SCORES, 3)
    mean = metrics.mean_of_requests(reciprocal_rank, scores, labels, owner)
    assert mean.value == pytest.approx((0.5 + 0.5 + 1) / 3) and mean.low <= mean.value <= mean.high
    values = metrics.of_requests(reciprocal_rank, scores, labels, owner)
    same = metrics.difference_of_requests(values, values)
    assert same.value == 0 and -same.low == same.high == pytest.approx(1 - 0.025 ** (1 / 3))
    better = metrics.difference_of_requests([1.0, 1.0, 1.0], values)
    assert better.value == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_values_are_those_of_ir_measures():
    ir_measures = pytest.importorskip("ir_measures", reason="the peer of these measures; pip install ir-measures")
    rng = np.random.default_rng(0)
    scores, labels = rng.random((20, 9)), rng.random((20, 9)) < 0.3
    qrels = [ir_measures.Qrel(str(q), str(d), int(labels[q, d])) for q in range(20) for d in range(9)]
    run = [ir_measures.ScoredDoc(str(q), str(d), scores[q, d]) for q in range(20) for d in range(9)]
    ours = {"RR": reciprocal_rank, "AP": average_precision, "R@3": recall(3)}
    theirs = {ir_measures.parse_measure(name): name for name in (*ours, "nDCG@4")}
    found = {(theirs[m.measure], int(m.query_id)): m.value for m in ir_measures.iter_calc(list(theirs), qrels, run)}
    for q in range(20):
        if labels[q].any():
            for name, measure in ours.items():
                assert measure(scores[q], labels[q]) == pytest.approx(found[name, q])
            (value,) = metrics.ndcg_of_requests(scores[q], labels[q], np.zeros(9), 4)
            assert value == pytest.approx(found["nDCG@4", q])
