"""Metrics: exact by enumeration, intervals that cover, and nothing undefined."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from limbeck.evaluate import metrics
from limbeck.evaluate.metrics import (
    accuracy,
    avg_at_n,
    mean_interval,
    mean_output_tokens,
    paired_difference,
    paired_gain,
    paired_retention,
    pass_at_k,
    stop_rate,
)

TABLES = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6))
FLOATS = st.floats(-1e6, 1e6, allow_nan=False)
VALUES = hnp.arrays(np.float64, st.integers(1, 30), elements=FLOATS)


@given(TABLES, st.data())
@settings(max_examples=40, deadline=None)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right: np.ndarray, data: st.DataObject) -> None:
    samples = right.shape[1]
    k = data.draw(st.integers(1, samples))
    subsets = list(itertools.combinations(range(samples), k))
    expected = np.mean([[row[list(subset)].any() for subset in subsets] for row in right])
    assert pass_at_k(right, k).value == pytest.approx(expected, abs=1e-12)


@given(TABLES)
@settings(max_examples=30, deadline=None)
def test_pass_at_k_joins_accuracy_and_any(right: np.ndarray) -> None:
    samples = right.shape[1]
    values = [pass_at_k(right, k).value for k in range(1, samples + 1)]
    assert values[0] == pytest.approx(accuracy(right).value)
    assert values[-1] == pytest.approx(right.any(1).mean())
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(values))
    assert avg_at_n(right, samples) == accuracy(right)
    assert avg_at_n(right, 1).value == pytest.approx(right[:, 0].mean())


@pytest.mark.parametrize("wanted", [0, 5, -1])
def test_more_samples_than_there_are_is_refused(wanted: int) -> None:
    right = np.ones((3, 4), dtype=bool)
    with pytest.raises(ValueError, match=r"k of pass@k is .*expected 1 to 4"):
        pass_at_k(right, wanted)
    with pytest.raises(ValueError, match=r"n of avg@n is .*expected 1 to 4"):
        avg_at_n(right, wanted)


@given(VALUES, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_intervals_hold_their_value(values: np.ndarray, seed: int) -> None:
    found = mean_interval(values, seed)
    assert found.value == pytest.approx(values.mean())
    assert values.min() - 1e-6 <= found.low <= found.value <= found.high <= values.max() + 1e-6
    assert found == mean_interval(values, seed)


@given(VALUES, st.floats(-100, 100), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_intervals_follow_shift_and_scale(values: np.ndarray, shift: float, scale: float) -> None:
    plain, moved = mean_interval(values), mean_interval(values * scale + shift)
    for name in ("value", "low", "high"):
        expected = getattr(plain, name) * scale + shift
        assert getattr(moved, name) == pytest.approx(expected, rel=1e-6, abs=1e-6 * (1 + np.abs(values).max() * scale))


def test_constant_values_have_no_width() -> None:
    assert mean_interval(np.full(7, 0.5)) == metrics.Interval(0.5, 0.5, 0.5)
    assert mean_output_tokens(np.full((5, 3), 0.1)).low == pytest.approx(0.1)


@pytest.mark.parametrize("probability", [0.3, 0.5, 0.8])
def test_interval_of_bernoulli_problems_covers(probability: float) -> None:
    rng = np.random.default_rng(11)
    trials, problems = 300, 150
    found = [mean_interval(rng.random(problems) < probability, seed) for seed in range(trials)]
    covered = np.mean([interval.low <= probability <= interval.high for interval in found])
    # 95 % with a standard error of 1.3 points; percentile intervals run a little short.
    assert 0.91 <= covered <= 0.985


def test_interval_counts_problems_and_not_samples() -> None:
    rng = np.random.default_rng(12)
    difficulty = rng.random(40)
    few = accuracy(rng.random((40, 4)) < difficulty[:, None])
    many = accuracy(rng.random((40, 400)) < difficulty[:, None])
    assert many.high - many.low > 0.6 * (few.high - few.low)


def test_retention_interval_covers_and_pairing_narrows_it() -> None:
    rng = np.random.default_rng(13)
    trials, problems = 300, 200
    covered, widths = [], []
    for seed in range(trials):
        uncut = rng.random(problems) < 0.8
        cut = np.where(uncut, rng.random(problems) < 0.9, rng.random(problems) < 0.1)
        found = paired_retention(cut, uncut, seed)
        covered.append(found.low <= (0.8 * 0.9 + 0.2 * 0.1) / 0.8 <= found.high)
        if seed < 20:
            shuffled = paired_retention(rng.permutation(cut), uncut, seed)
            widths.append((found.high - found.low) / (shuffled.high - shuffled.low))
    assert 0.91 <= np.mean(covered) <= 0.985
    assert np.mean(widths) < 0.8


@given(hnp.arrays(bool, 12), hnp.arrays(bool, 12), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_retention_is_ordered_or_has_a_reason(cut: np.ndarray, uncut: np.ndarray, seed: int) -> None:
    found = paired_retention(cut, uncut, seed)
    if not uncut.any():
        assert math.isnan(found.value)
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert "uncut run scores 0" in found.reason
    else:
        assert found.value == pytest.approx(cut.mean() / uncut.mean())
        assert 0 <= found.low <= found.value <= found.high
        assert found.reason == ""


@pytest.mark.parametrize("problems", [10, 100, 300])
def test_none_and_all_of_n_have_the_exact_interval(problems: int) -> None:
    """The bound is the share under which seeing none of n has a probability of 2.5 %."""
    none, every = accuracy(np.zeros(problems, dtype=bool)), stop_rate(np.ones((problems, 2), dtype=bool))
    assert (none.value, none.low) == (0.0, 0.0) and (every.value, every.high) == (1.0, 1.0)
    assert (1 - none.high) ** problems == pytest.approx(0.025)
    assert every.low == pytest.approx(1 - none.high)
    assert none.high == pytest.approx({10: 0.308, 100: 0.036, 300: 0.012}[problems], abs=6e-4)


def test_a_paired_difference_is_narrower_than_its_parts_and_never_certain_of_0() -> None:
    rng = np.random.default_rng(5)
    hard = rng.random(200)
    better, worse = (rng.random(200) < np.clip(hard + gain, 0, 1) for gain in (0.1, 0.0))
    found = paired_difference(better, worse)
    assert found.value == pytest.approx(better.mean() - worse.mean()) and found.low < found.value < found.high
    same = paired_difference(better, better)
    assert same.value == 0 and -same.low == same.high == pytest.approx(accuracy(np.zeros(200)).high)
    assert paired_retention(np.zeros(50), np.ones(50)).high == pytest.approx(1 - 0.025 ** (1 / 50))


def test_retention_of_an_equal_run_is_one_within_what_the_problems_could_miss() -> None:
    scores = np.random.default_rng(3).random(50)
    found = paired_retention(scores, scores)
    assert found.value == 1.0 and found.low < 1 < found.high < 1.2
    rare = np.zeros(10)
    rare[0] = 1
    assert paired_retention(rare, rare).value == 1.0
    assert paired_retention(1 - rare, rare).high == math.inf


def test_gain_kept_by_hand() -> None:
    base, whole = [0, 0, 0, 1] * 50, [1, 1, 0, 1] * 50
    assert paired_gain(whole, whole, base).value == 1
    assert (paired_gain(base, whole, base).value, paired_gain(base, whole, base).high) == (0, 0)
    assert paired_gain([1, 0, 0, 1] * 50, whole, base).value == pytest.approx(0.5)
    assert paired_gain([0, 0, 0, 0] * 50, whole, base).value == pytest.approx(-0.5)


def test_gain_kept_covers() -> None:
    rng, problems, covered = np.random.default_rng(5), 250, []
    for seed in range(200):
        difficulty = rng.random(problems)
        base, cut, whole = (difficulty < level for level in (0.4, 0.7, 0.8))
        noise = rng.random((2, problems)) < 0.1
        found = paired_gain(np.where(noise[0], ~cut, cut), np.where(noise[1], ~whole, whole), base, seed)
        # A tenth of the scores is turned round: 0.9 x + 0.1 (1 - x).
        covered.append(found.low <= (0.66 - 0.4) / (0.74 - 0.4) <= found.high)
    assert np.mean(covered) >= 0.91


def test_gain_kept_needs_a_gain() -> None:
    scores = np.random.default_rng(2).random((3, 40)) < 0.5
    found = paired_gain(*scores)
    assert math.isnan(found.value) and math.isnan(found.low)
    assert "cannot be told from 0" in found.reason
    with pytest.raises(ValueError, match="found 2, 3 and 3 scores"):
        paired_gain([1, 0], [1, 0, 1], [0, 0, 0])


def test_retention_needs_the_same_problems() -> None:
    with pytest.raises(ValueError, match="found 3 scores and 4 of the other run"):
        paired_retention([1, 0, 1], [1, 0, 1, 1])


@pytest.mark.parametrize("values", [[], np.zeros((3, 0)), np.zeros((2, 2, 2)), [1.0, math.nan], [math.inf]])
def test_values_without_a_mean_are_refused(values: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        mean_interval(values)  # type: ignore[arg-type]


def test_chunks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).random(60)
    whole = mean_interval(values, 9)
    monkeypatch.setattr(metrics, "_CHUNK_ENTRIES", 60 * 7)
    assert mean_interval(values, 9) == whole
