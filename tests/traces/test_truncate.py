"""Each policy on samples small enough to check by eye, the exact floor, and what configs refuse."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from limbeck.config import build
from limbeck.errors import ConfigError
from limbeck.traces.sample import ANSWER, COT, PROMPT, Sample
from limbeck.traces.truncate import TruncationConfig, apply_cut, exact_fraction, share_of, truncate

# 3 prompt, 10 cot (the last 3 are the end marker), 3 answer tokens; the derivation ends with token 7.
SAMPLE = Sample(
    input_ids=np.arange(100, 116, dtype=np.int32),
    segment_ids=np.array([PROMPT] * 3 + [COT] * 10 + [ANSWER] * 3, dtype=np.int8),
    ending_start=10,
    derivation_end=8,
    trace_key="a",
)
OPEN = Sample(input_ids=SAMPLE.input_ids[:10], segment_ids=SAMPLE.segment_ids[:10], ending_start=10, trace_key="open")
NO_COT = Sample(
    input_ids=np.arange(8, dtype=np.int32),
    segment_ids=np.array([PROMPT] * 5 + [ANSWER] * 3, dtype=np.int8),
    ending_start=5,
    trace_key="plain",
)
ENDING = list(range(10, 16))


def kept(sample: Sample = SAMPLE, **fields) -> list[int]:
    return truncate(sample, TruncationConfig(**fields)).kept.tolist()


@pytest.mark.parametrize("value", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.57, 0.29, "1/3"])
def test_the_share_is_the_exact_floor_at_every_length(value):
    written = Fraction(str(value))
    assert exact_fraction(value) == written
    for length in range(1, 4097):
        assert share_of(length, value) == max(1, math.floor(written * length))


def test_a_float_product_would_be_wrong_where_the_exact_floor_is_right():
    assert int(0.7 * 10) == 7 and share_of(10, 0.7) == 7
    assert int(0.29 * 100) == 28 and share_of(100, 0.29) == 29
    assert share_of(0, 0.5) == 0


@pytest.mark.parametrize(
    "value", [0, 0.0, -0.5, 1.5, 7, math.nan, math.inf, "abc", "", "1/0", "3/2", "nan", True, False, None, [0.5]]
)
def test_anything_but_a_share_is_an_error_that_quotes_it(value):
    with pytest.raises(ConfigError, match="lead_fraction"):
        TruncationConfig(lead_fraction=value)
    with pytest.raises(ConfigError, match="lead_fraction"):
        build(TruncationConfig, {"lead_fraction": value})


@pytest.mark.parametrize("value", [1, 1.0, "1", "1.0", "7/7", " 1/2 ", "5e-1", Fraction(1, 3)])
def test_every_way_to_write_a_share_is_accepted(value):
    assert 0 < exact_fraction(value) <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "leed"}, "did you mean 'lead'"),
        ({"unit": "thought"}, "unit: Input should be"),
        ({"policy": "budget"}, "needs it"),
        ({"budget_tokens": 3}, "goes with policy budget"),
        ({"policy": "budget", "budget_tokens": 0}, "at least 1"),
        ({"policy": "budget", "budget_tokens": 3, "lead_fraction": 0.5}, "no meaning"),
        ({"policy": "first_derivation", "lead_fraction": 0.5}, "no meaning"),
    ],
)
def test_contradicting_configs_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TruncationConfig(**fields)


@pytest.mark.parametrize(
    ("policy", "unit", "expected"),
    [
        ("lead", "sequence", range(8)),
        ("tail", "sequence", range(8, 16)),
        ("middle", "sequence", range(4, 12)),
        ("lead", "response", range(9)),
        ("tail", "response", [0, 1, 2, *range(10, 16)]),
        ("middle", "response", [0, 1, 2, *range(6, 12)]),
        ("lead", "cot", range(8)),
        ("tail", "cot", [0, 1, 2, *range(8, 13)]),
        ("middle", "cot", [0, 1, 2, *range(5, 10)]),
    ],
)
def test_half_of_each_unit(policy, unit, expected):
    assert kept(policy=policy, unit=unit, lead_fraction=0.5) == list(expected)


def test_the_cut_is_at_least_one_token():
    assert kept(lead_fraction=0.001) == [0]
    assert kept(lead_fraction=0.001, unit="cot") == [0, 1, 2, 3]


def test_a_budget_takes_tokens_of_its_unit_and_is_the_identity_when_it_suffices():
    assert kept(policy="budget", budget_tokens=5) == [0, 1, 2, 3, 4]
    assert kept(policy="budget", budget_tokens=5, unit="response") == [*range(8)]
    for unit, length in (("sequence", 16), ("response", 13), ("cot", 10)):
        for budget in (length, length + 1, 10**9):
            assert kept(policy="budget", budget_tokens=budget, unit=unit) == [*range(16)]


@pytest.mark.parametrize("unit", ["sequence", "response", "cot"])
def test_first_derivation_stops_at_the_answer(unit):
    assert kept(policy="first_derivation", unit=unit) == [*range(8)]
    assert kept(policy="first_derivation", unit=unit, keep_ending=True) == [*range(8), *ENDING]
    assert kept(OPEN, policy="first_derivation", unit=unit) == [*range(10)]


@pytest.mark.parametrize("unit", ["sequence", "response", "cot"])
def test_keep_ending_reattaches_marker_answer_and_end_of_turn(unit):
    without = kept(lead_fraction="1/10", unit=unit)
    assert kept(lead_fraction="1/10", unit=unit, keep_ending=True) == [*without, *ENDING]


def test_keep_ending_without_a_thought_keeps_the_answer_and_of_an_open_one_nothing_more():
    assert kept(NO_COT, lead_fraction=0.25, keep_ending=True) == [0, 1, 5, 6, 7]
    assert kept(OPEN, lead_fraction=0.5, keep_ending=True) == [0, 1, 2, 3, 4]


def test_a_unit_without_tokens_is_not_cut():
    assert kept(NO_COT, lead_fraction=0.1, unit="cot") == [*range(8)]
    assert kept(NO_COT, policy="budget", budget_tokens=1, unit="cot") == [*range(8)]


def test_mask_only_keeps_the_context_and_cuts_the_loss():
    cut = truncate(SAMPLE, TruncationConfig(policy="tail", lead_fraction=0.25, unit="response", mask_only=True))
    assert cut.kept.tolist() == [*range(16)]
    assert np.flatnonzero(cut.supervised).tolist() == [0, 1, 2, 13, 14, 15]


def test_random_spans_change_with_the_seed_and_with_the_trace():
    def spans(key: str) -> list[int]:
        sample = Sample(
            input_ids=np.zeros(100, np.int32), segment_ids=np.ones(100, np.int8), ending_start=100, trace_key=key
        )
        return [kept(sample, policy="random_span", lead_fraction=0.1, seed=seed)[0] for seed in range(200)]

    first = spans("a")
    assert first == spans("a") != spans("b")
    assert min(first) < 10 and max(first) > 80 and 35 < np.mean(first) < 55


def test_landmarks_move_with_the_cut():
    def cut(**fields) -> Sample:
        config = TruncationConfig(**fields)
        return apply_cut(SAMPLE, truncate(SAMPLE, config))

    half = cut(lead_fraction=0.5)
    assert (half.ending_start, half.derivation_end, half.trace_key) == (8, 8, "a")
    assert cut(lead_fraction="7/16").derivation_end is None
    joined = cut(lead_fraction=0.5, keep_ending=True)
    assert joined.input_ids[joined.ending_start :].tolist() == SAMPLE.input_ids[10:].tolist()
    tail = cut(policy="tail", unit="response", lead_fraction="9/13")
    assert (tail.ending_start, tail.derivation_end) == (6, 4)
    assert tail.input_ids[tail.derivation_end - 1] == SAMPLE.input_ids[7]
