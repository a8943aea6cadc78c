"""Filters, duplicates and the split."""

from __future__ import annotations

import random

import pytest

from limbeck.errors import ConfigError
from limbeck.traces.select import SelectConfig, deduplicate, filter_traces, select_traces, split_traces
from limbeck.traces.trace import Trace


def make(prompt: str, cot: str | None = "thought", correct: bool | None = None) -> Trace:
    return Trace(messages=({"role": "user", "content": prompt},), cot=cot, answer="a", correct=correct)


MANY = [make(f"problem {number}", cot=f"thought {copy}") for number in range(400) for copy in range(2)]


def test_first_trace_of_a_prompt_stays() -> None:
    traces = [make("p", "one"), make("q"), make("p", "two"), make("p", "three")]
    kept, counts = deduplicate(traces)
    assert [trace.cot for trace in kept] == ["one", "thought"]
    assert (counts.kept, counts.dropped) == (2, {"duplicate prompt": 2})
    assert deduplicate(kept)[1].dropped == {}


def test_filter_counts_by_first_reason() -> None:
    traces = [
        make("1", "x" * 4, True),
        make("2", "x" * 5, True),
        make("3", "x" * 8, True),
        make("4", "x" * 9, True),
        make("5", None, True),
        make("6", "x" * 5, False),
        make("7", "x", None),
    ]
    kept, counts = filter_traces(traces, SelectConfig(require_correct=True, min_cot_chars=5, max_cot_chars=8))
    assert [trace.messages[0]["content"] for trace in kept] == ["2", "3"]
    assert counts.dropped == {
        "thought too short": 2,
        "thought too long": 1,
        "wrong answer": 1,
        "not verified": 1,
    }
    assert counts.kept == 2


def test_default_filter_keeps_all() -> None:
    traces = [make("1", None), make("2", "x", False)]
    assert filter_traces(traces, SelectConfig())[0] == traces


def test_wrong_first_trace_does_not_cost_the_prompt() -> None:
    traces = [make("p", "wrong", False), make("p", "right", True), make("p", "also", True)]
    kept, counts = select_traces(traces, SelectConfig(require_correct=True))
    assert [trace.cot for trace in kept] == ["right"]
    assert counts.dropped == {"wrong answer": 1, "duplicate prompt": 1}
    assert len(select_traces(traces, SelectConfig(deduplicate=False))[0]) == 3


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no trace is left of 1 \(1 wrong answer\)"):
        select_traces([make("p", correct=False)], SelectConfig(require_correct=True))


@pytest.mark.parametrize(
    "values", [{"min_cot_chars": -1}, {"max_cot_chars": 0}, {"min_cot_chars": 9, "max_cot_chars": 8}]
)
def test_config_refuses(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="cot_chars"):
        SelectConfig(**values)


def test_split_by_fraction_depends_on_prompt_and_seed_only() -> None:
    _, whole = split_traces(MANY, seed=1, validation_fraction=0.25)
    held_out = {trace.prompt_key for trace in whole}
    shuffled = random.Random(0).sample(MANY, 300)
    train, validation = split_traces(shuffled, seed=1, validation_fraction=0.25)
    assert {trace.prompt_key for trace in validation} == held_out & {trace.prompt_key for trace in shuffled}
    assert not {trace.prompt_key for trace in train} & {trace.prompt_key for trace in validation}
    assert [trace for trace in shuffled if trace in train] == train
    # 400 prompts: three standard deviations are 26.
    assert abs(len(held_out) - 100) <= 26


def test_larger_fraction_holds_out_a_superset() -> None:
    small = {trace.prompt_key for trace in split_traces(MANY, seed=1, validation_fraction=0.1)[1]}
    large = {trace.prompt_key for trace in split_traces(MANY, seed=1, validation_fraction=0.3)[1]}
    assert small < large


def test_seeds_hold_out_different_prompts() -> None:
    first = {trace.prompt_key for trace in split_traces(MANY, seed=1, validation_fraction=0.2)[1]}
    second = {trace.prompt_key for trace in split_traces(MANY, seed=2, validation_fraction=0.2)[1]}
    assert len(first & second) < len(first) / 2


def test_split_by_number() -> None:
    train, validation = split_traces(MANY, seed=3, num_validation=51)
    # Prompts come in pairs and stay together.
    assert (len(train), len(validation)) == (748, 52)
    assert not {trace.prompt_key for trace in train} & {trace.prompt_key for trace in validation}
    again = split_traces(MANY[::-1], seed=3, num_validation=51)[1]
    assert {trace.key for trace in again} == {trace.key for trace in validation}


def test_nothing_held_out() -> None:
    assert split_traces(MANY, seed=0, validation_fraction=0.0) == (MANY, [])
    assert split_traces(MANY, seed=0, num_validation=0) == (MANY, [])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"validation_fraction": 0.1, "num_validation": 3},
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
        {"validation_fraction": float("nan")},
        {"num_validation": -1},
        {"num_validation": 800},
    ],
)
def test_split_refuses(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="validation"):
        split_traces(MANY, seed=0, **arguments)  # type: ignore[arg-type]
