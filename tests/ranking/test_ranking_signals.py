"""Signals: counts of the past only, held-out labels never counted, factor scores of earlier requests, and baselines."""

import importlib.util

import numpy as np
import pytest

from limbeck.errors import ConfigError
from limbeck.ranking.arrays import arrays_of
from limbeck.ranking.auc import auc
from limbeck.ranking.baselines import baseline_scores, item_rates
from limbeck.ranking.data import RankingDataConfig
from limbeck.ranking.interaction import Interaction, LogRow
from limbeck.ranking.request import GroupingConfig, group_log
from limbeck.ranking.signals import counts_before, with_signals
from limbeck.ranking.split import SplitConfig, split_requests


def log_rows(count=4000, members=60, items=40, seed=0):
    """Two kinds of members and of items: a member takes those of its kind, and some items are better than others."""
    rng = np.random.default_rng(seed)
    member, item = rng.integers(members, size=count), rng.integers(items, size=count)
    logits = np.where(member % 2 == item % 2, 1.5, -1.5) + np.linspace(-2, 2, items)[item]
    labels = rng.random(count) < 1 / (1 + np.exp(-logits))
    return [
        LogRow(f"m{m}", Interaction(item_id=f"i{i}", item={"n": f"{i}"}, label=bool(y), time=float(t)))
        for t, (m, i, y) in enumerate(zip(member, item, labels, strict=True))
    ]


def split_of(rows):
    requests, _ = group_log(rows, {}, GroupingConfig(candidates=5, history=30))
    return split_requests(requests, SplitConfig())


@pytest.fixture(scope="module")
def split():
    return split_of(log_rows())


def test_counts_before_a_moment():
    rng = np.random.default_rng(1)
    items, times, labels = rng.integers(4, size=50), rng.integers(20, size=50).astype(float), rng.random(50) < 0.5
    asked, moments = rng.integers(5, size=30), rng.integers(-1, 22, size=30).astype(float)
    shown, yes = counts_before(items, times, labels, asked, moments)
    for n in range(30):
        known = (items == asked[n]) & (times < moments[n])
        assert (shown[n], yes[n]) == (known.sum(), labels[known].sum())


def test_signals_count_what_training_knew_before_the_request(split):
    new, rows = with_signals(split, ("rate", "member")), log_rows()
    known = [(c.item_id, c.time) for r in split.train for c in r.candidates]
    for request in (new.train[3], new.train[200], new.validation[0], new.test[-1]):
        own = sum(row.member_id == request.member_id and row.interaction.time < request.time for row in rows)
        assert request.member["events"] == f"k{own.bit_length()}"
        for candidate in request.candidates:
            count = sum(item == candidate.item_id and time < request.time for item, time in known)
            assert candidate.item["seen"] == f"n{count.bit_length()}"


def test_words_rank_candidates_and_stand_with_them_alone(split):
    new = with_signals(split, ("rate", "member", "factors"))
    request = new.test[-1]
    assert set(request.candidates[0].item) == {"n", "rate", "seen", "fit"} and set(request.member) == {
        "liked",
        "events",
    }
    assert set(request.history[0].item) == {"n"}
    labels = np.array([c.label for r in new.test for c in r.candidates])
    numbers = {
        name: np.array([int(c.item[name][1:]) for r in new.test for c in r.candidates]) for name in ("rate", "fit")
    }
    assert auc(numbers["rate"], labels) > 0.58
    assert auc(numbers["fit"], labels) > 0.72
    first = new.train[0].candidates[0].item
    assert "fit" not in first and first["seen"] == "n0", "nothing is known before the first block"
    assert len({c.item.get("fit") for r in new.train for c in r.candidates}) > 12


def test_baselines_of_a_log(split):
    found = baseline_scores(split, split.test)
    labels = np.array([c.label for r in split.test for c in r.candidates])
    areas = {name: auc(scores, labels) for name, scores in found.items()}
    assert areas["random order"] == pytest.approx(0.5, abs=0.06)
    assert areas["factor model"] > areas["item rate"] + 0.05 > areas["random order"] + 0.05
    assert ("LightGBM (log-loss)" in found) == (importlib.util.find_spec("lightgbm") is not None)
    assert "BM25" not in found and all(len(scores) == len(labels) for scores in found.values())


def test_the_item_rate_is_that_of_training():
    small = split_of(log_rows(1500))
    (train, test), count = arrays_of([small.train, small.test])
    rates = item_rates(train, test, count)
    for row in range(0, len(test.items), 7):
        known = train.labels[train.items == test.items[row]]
        assert rates[row] == pytest.approx((known.sum() + 5 * train.labels.mean()) / (len(known) + 5))


def test_signals_need_a_log():
    with pytest.raises(ConfigError, match="of a log"):
        RankingDataConfig(source="synthetic", signals=("rate",))
