"""Common lengths and random horizons: exact on counts, and unbiased for whole traces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.distill.microbatch import step_totals
from limbeck.errors import ConfigError
from limbeck.traces.batch import make_example
from limbeck.traces.fit import fit, unit_lengths
from limbeck.traces.horizon import DRAWS, common_length, horizon, horizon_scale, horizon_weights, survival
from limbeck.traces.sample import COT, PROMPT, Sample
from limbeck.traces.supervise import SupervisionConfig
from limbeck.traces.truncate import TruncationConfig, share_of, truncate

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=20).map(np.array)


def traces(lengths, prompt: int = 0) -> list[Sample]:
    return [
        Sample(
            input_ids=np.arange(prompt + n, dtype=np.int32),
            segment_ids=np.repeat(np.array([PROMPT, COT], dtype=np.int8), [prompt, n]),
            ending_start=prompt + n,
            trace_key=f"trace {i}",
        )
        for i, n in enumerate(lengths)
    ]


@given(LENGTHS, st.data())
def test_the_common_length_is_the_largest_that_the_budget_holds(lengths, data):
    budget = data.draw(st.integers(len(lengths), int(lengths.sum())))
    found = common_length(lengths, budget)
    fitting = [n for n in range(1, int(lengths.max()) + 1) if sum(min(n, length) for length in lengths) <= budget]
    assert found == max(fitting)


@given(LENGTHS, st.sampled_from(["0.3", "1/2", "0.75", "0.9"]))
def test_a_share_of_all_tokens_is_kept_to_the_token_that_one_more_a_trace_would_pass(lengths, share):
    samples = traces(lengths)
    wanted = share_of(int(lengths.sum()), share)
    if wanted < len(lengths):
        return
    cut = fit(TruncationConfig(policy="common_length", lead_fraction=share), samples)
    kept = [len(truncate(sample, cut).kept) for sample in samples]
    assert kept == [min(int(n), cut.budget_tokens) for n in lengths]
    assert sum(kept) <= wanted < sum(min(int(n), cut.budget_tokens + 1) for n in lengths) or sum(kept) == lengths.sum()


def test_equal_lengths_are_cut_as_by_a_share_of_each():
    samples = traces([40] * 7, prompt=5)
    common = fit(TruncationConfig(policy="common_length", lead_fraction=0.35, unit="response"), samples)
    lead = TruncationConfig(lead_fraction=0.35, unit="response")
    assert [truncate(s, common).kept.tolist() for s in samples] == [truncate(s, lead).kept.tolist() for s in samples]


@given(LENGTHS, st.data())
def test_the_scale_is_the_largest_whose_expected_tokens_the_budget_holds(lengths, data):
    budget = data.draw(st.integers(len(lengths), int(lengths.sum())))

    def expected(scale: int) -> float:
        return sum(survival(int(n), scale).sum() for n in lengths)

    found, longest = horizon_scale(lengths, budget), int(lengths.max())
    assert found == 1 or expected(found) <= budget + 1e-6
    assert found == longest or expected(found + 1) > budget - 1e-6


@given(st.integers(1, 50), st.integers(1, 200), st.lists(st.floats(-5, 5), min_size=200, max_size=200))
def test_the_expected_weighted_loss_is_that_of_the_whole_trace(scale, length, losses):
    """Over all draws exactly: the horizon is a step function of the draw, so its probabilities are differences."""
    loss = np.array(losses[:length])
    # u <= N / t keeps the token at t: count draws by the interval of u that each horizon takes.
    reach = survival(length, scale)
    ends = np.append(reach, 0.0)
    expected = sum(
        (ends[kept - 1] - ends[kept]) * (loss[:kept] * horizon_weights(length, scale)[:kept]).sum()
        for kept in range(1, length + 1)
    )
    assert expected == pytest.approx(loss.sum(), rel=1e-5, abs=1e-4)
    for kept in (1, length // 2, length):
        if 0 < kept < length and reach[kept] < 1:
            edge = int(reach[kept] * DRAWS)
            assert min(length, horizon(max(0, edge - DRAWS // 10**6), scale)) > kept
            assert horizon(min(DRAWS - 1, edge + DRAWS // 10**6), scale) <= kept


def test_draws_over_seeds_are_unbiased_in_the_means_of_a_step():
    samples = traces([30, 55, 80, 120, 200], prompt=4)
    supervision = SupervisionConfig(preset="cot+answer")
    whole = [make_example(sample, TruncationConfig(), supervision) for sample in samples]
    losses = [np.cos(np.arange(len(sample)) / 9.0) + 1 for sample in samples]

    def mean_loss(examples) -> float:
        total = sum(float(e.ce_weight @ losses[i][: len(e)]) for i, e in enumerate(examples))
        return total / step_totals(examples, "token_mean").ce

    policy = TruncationConfig(policy="random_horizon", lead_fraction=0.5)
    means, tokens = [], []
    for seed in range(2000):
        cut = fit(TruncationConfig(policy="random_horizon", lead_fraction=0.5, seed=seed), samples)
        drawn = [make_example(sample, cut, supervision) for sample in samples]
        means.append(mean_loss(drawn))
        tokens.append(sum(map(len, drawn)))
    error = np.std(means) / np.sqrt(len(means))
    assert np.mean(means) == pytest.approx(mean_loss(whole), abs=4 * error) and error < 0.02
    scale = fit(policy, samples).budget_tokens
    assert np.mean(tokens) == pytest.approx(sum(survival(len(sample), scale).sum() for sample in samples), rel=0.02)
    again = [truncate(sample, fit(policy, samples)).kept.tolist() for sample in samples]
    assert again == [truncate(sample, fit(policy, samples)).kept.tolist() for sample in samples]


def test_clipped_weights_stay_below_their_limit():
    samples = traces([300] * 40)
    cut = fit(TruncationConfig(policy="random_horizon", lead_fraction=0.3, max_weight=2.0), samples)
    weights = np.concatenate([truncate(sample, cut).loss_weight() for sample in samples])
    free = fit(TruncationConfig(policy="random_horizon", lead_fraction=0.3), samples)
    unclipped = np.concatenate([truncate(sample, free).loss_weight() for sample in samples])
    assert weights.max() == 2.0 < unclipped.max()
    np.testing.assert_array_equal(weights, np.minimum(unclipped, 2.0))


def test_a_horizon_that_masks_only_trains_the_same_tokens():
    samples = traces([50, 90, 20], prompt=3)
    cut = fit(TruncationConfig(policy="random_horizon", lead_fraction=0.5, unit="response"), samples)
    masked = fit(TruncationConfig(policy="random_horizon", lead_fraction=0.5, unit="response", mask_only=True), samples)
    for sample in samples:
        short, long = truncate(sample, cut), truncate(sample, masked)
        assert len(long.kept) == len(sample)
        np.testing.assert_array_equal(long.kept[long.supervised], short.kept)
        np.testing.assert_array_equal(long.loss_weight()[long.supervised], short.loss_weight())


@settings(max_examples=30)
@given(st.lists(st.integers(20, 60), min_size=30, max_size=60).map(np.array), st.floats(0, 0.3))
def test_whole_traces_count_in_the_share_of_a_common_length(lengths, whole):
    samples = traces(lengths)
    policy = TruncationConfig(policy="common_length", lead_fraction=0.6, whole_fraction=whole)
    try:
        cut = fit(policy, samples)
    except ConfigError as error:
        assert "leaves none for the others" in str(error)
        return
    kept = [len(truncate(sample, cut).kept) for sample in samples]
    assert sum(kept) <= 0.6 * lengths.sum() < sum(kept) + len(lengths)
    assert all(k == n or k == cut.budget_tokens for k, n in zip(kept, lengths, strict=True))


def test_the_whole_traces_of_a_smaller_share_are_among_those_of_a_larger_one():
    samples = traces([10] * 400)

    def whole(share: float) -> set[int]:
        cut = TruncationConfig(lead_fraction=0.5, whole_fraction=share)
        return {i for i, sample in enumerate(samples) if len(truncate(sample, cut).kept) == 10}

    assert whole(0.0) < whole(0.1) < whole(0.4) < whole(1.0) and len(whole(1.0)) == 400
    assert 20 < len(whole(0.1)) < 65


def test_what_needs_all_traces_is_refused_without_them():
    with pytest.raises(ConfigError, match="all traces together"):
        truncate(traces([10])[0], TruncationConfig(policy="common_length", lead_fraction=0.5))
    assert fit(TruncationConfig(policy="common_length"), traces([10])).policy == "common_length"
    assert unit_lengths(traces([3, 9], prompt=2), TruncationConfig(unit="sequence")).tolist() == [5, 11]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"whole_fraction": 1.5}, "whole_fraction must be"),
        ({"max_weight": 2.0}, "max_weight"),
        ({"policy": "random_horizon", "lead_fraction": 0.5, "max_weight": 0.5}, "at least 1"),
        ({"policy": "random_horizon", "lead_fraction": 0.5, "whole_fraction": 0.1}, "whole_fraction"),
        ({"policy": "random_horizon", "lead_fraction": 0.5, "keep_ending": True}, "keep_ending"),
        ({"policy": "random_horizon", "lead_fraction": 0.5, "budget_tokens": 9}, "no meaning"),
        ({"policy": "common_length", "lead_fraction": 0.5, "budget_tokens": 9}, "goes with policy budget"),
    ],
)
def test_contradicting_amounts_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TruncationConfig(**fields)
