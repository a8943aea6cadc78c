"""The embedded task: its arithmetic, its traces, and that the built-in tokenizer can say all of it."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from limbeck.errors import ConfigError
from limbeck.models.tiny import symbol_tokenizer
from limbeck.traces.render import RenderConfig, render
from limbeck.traces.synthetic import DERIVATION_PATTERN, apply_step, generate, make_trace, problem_text

TRACES = generate(300, seed=0, min_steps=1, max_steps=16)


def test_a_trace_written_out():
    trace = make_trace(7, [("+", 4), ("*", 3), ("-", 8)])
    assert trace.messages[0]["content"] == "7 a+4 b*3 c-8"
    assert trace.cot.split("\n") == [
        "Given 7a+4b*3c-8",
        "a 7+4=1",
        "b 1*3=3",
        "c 3-8=5",
        "So 5",
        "Check",
        "c 5+8=3 b=3 ok",
        "b 3/3=1 a=1 ok",
        "a 1-4=7 start=7 ok",
    ]
    assert (trace.answer, trace.reference, trace.correct) == ("5", "5", True)


def test_every_line_is_right():
    for trace in TRACES:
        start, *steps = re.findall(r"[+*-]?\d", trace.messages[0]["content"])
        value = int(start)
        for step in steps:
            value = {"+": value + int(step[1]), "-": value - int(step[1]), "*": value * int(step[1])}[step[0]] % 10
        assert trace.answer == trace.reference == str(value)
        for a, op, b, c in re.findall(r"(\d)([-+*/])(\d)=(\d)", trace.cot):
            # A division by 3, 7 or 9 is undone by the product.
            if op == "/":
                assert int(c) * int(b) % 10 == int(a)
            else:
                assert apply_step(int(a), (op, int(b))) == int(c)


def test_the_check_undoes_the_derivation_step_by_step():
    for trace in TRACES:
        forward, backward = trace.cot.split("\nCheck\n")
        values = [int(v) for v in re.findall(r"=(\d)", forward)]
        undone = [int(v) for v in re.findall(r"=(\d) \w+=\1 ok", backward)]
        assert len(undone) == len(values) == trace.metadata["num_steps"] == backward.count("ok")
        assert undone == [*values[-2::-1], int(trace.messages[0]["content"][0])]


def test_problems_are_distinct_seeded_and_of_all_lengths():
    assert len({trace.prompt_key for trace in TRACES}) == 300
    assert [t.key for t in generate(20, 0, 1, 16)] == [t.key for t in TRACES[:20]]
    assert generate(20, 1, 1, 16)[0].key != TRACES[0].key
    lengths = Counter(trace.metadata["num_steps"] for trace in TRACES)
    assert set(lengths) == set(range(1, 17))


def test_short_problems_run_out_without_hanging():
    traces = generate(105, seed=0, min_steps=1, max_steps=1)
    assert len({trace.prompt_key for trace in traces}) == 105
    with pytest.raises(ConfigError, match="210 exist"):
        generate(106, seed=0, min_steps=1, max_steps=1)


@pytest.mark.parametrize(("low", "high"), [(0, 3), (4, 3), (1, 17)])
def test_impossible_ranges_are_refused(low, high):
    with pytest.raises(ConfigError, match="expected 1 <= min <= max <= 16"):
        generate(1, 0, low, high)


def test_the_built_in_tokenizer_says_every_symbol_as_one_token():
    tokenizer = symbol_tokenizer()
    unknown = tokenizer.convert_tokens_to_ids("<|unknown|>")
    for trace in TRACES:
        sample = render(trace, tokenizer, RenderConfig())
        assert unknown not in sample.input_ids
        assert tokenizer.decode(sample.input_ids.tolist()).endswith(
            f"{trace.cot}\n</think>\n\n{trace.answer}<|im_end|>"
        )
        assert len(tokenizer.tokenize(problem_text(3, [("+", 4)]))) == 5


def test_the_first_derivation_is_the_line_so_near_the_middle():
    config = RenderConfig(derivation_pattern=DERIVATION_PATTERN)
    tokenizer, positions = symbol_tokenizer(), []
    for trace in TRACES:
        sample = render(trace, tokenizer, config)
        derived = tokenizer.decode(sample.input_ids[: sample.derivation_end].tolist())
        assert derived.endswith(f"\nSo {trace.answer}") and "Check" not in derived
        positions.append(sample.derivation_end / len(sample))
    assert 0.45 < np.median(positions) < 0.6
