"""The task builtin:recheck: its arithmetic, its kinds of re-checks, and the statistics that its settings promise."""

from __future__ import annotations

import random
import re
from statistics import fmean, pstdev

import numpy as np
import pytest

from limbeck.config import build
from limbeck.errors import ConfigError
from limbeck.models.tiny import symbol_tokenizer
from limbeck.traces.recheck import LONGEST_LINES, RecheckConfig, generate_rechecked, make_trace, round_at_random
from limbeck.traces.render import RenderConfig, render
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.synthetic import DERIVATION_PATTERN, apply_step

TRACES = generate_rechecked(600, 5, RecheckConfig())


def lines_behind(config, count=400):
    """Lines behind the derivation over its own lines, of every trace."""
    traces = generate_rechecked(count, 1, config)
    return [trace.metadata["check_lines"] / trace.metadata["derivation_lines"] for trace in traces]


def test_the_derivation_comes_first_and_each_kind_of_check_restates_the_answer():
    kinds = set()
    for number in range(30):
        trace = make_trace(8, [("+", 7), ("*", 9)], RecheckConfig(spread=0), random.Random(number))
        derivation, *checks = re.split(r"(?<=So 5)\n", trace.cot)
        assert derivation == "Given 8a+7b*9\na 8+7=5\nb 5*9=5\nSo 5" and trace.answer == "So 5"
        there_and_back = r"Check 5[+-]5=0\nCheck 0[+-]5=5 ok\n"
        assert all(re.fullmatch(rf"(Check 5 ok\n|({there_and_back}){{1,3}})So 5", check) for check in checks)
        kinds |= {check.count("\n") for check in checks}
    assert kinds == {1, 2, 4, 6}


def test_every_line_is_right_and_the_prompt_shows_the_steps():
    for trace in TRACES:
        start, *steps = re.findall(r"[-+*]?\d", trace.messages[0]["content"])
        value = int(start)
        for step in steps:
            value = apply_step(value, (step[0], int(step[1])))
        assert trace.answer == f"So {value}" and trace.reference == str(value)
        assert len(steps) == trace.metadata["num_steps"]
        assert set(re.findall(r"So (\d)", trace.cot)) == {trace.reference}
        for a, op, b, c in re.findall(r"(\d)([-+*/])(\d)=(\d)", trace.cot):
            # A division by 3, 7 or 9 is undone by the product.
            assert int(a) == int(c) * int(b) % 10 if op == "/" else int(c) == apply_step(int(a), (op, int(b)))


def test_lines_are_counted_before_and_behind_the_first_derivation():
    for trace in TRACES:
        lines = trace.cot.split("\n")
        first = next(number for number, line in enumerate(lines) if line.startswith("So")) + 1
        assert (first, len(lines) - first) == (trace.metadata["derivation_lines"], trace.metadata["check_lines"])
        assert len(lines) <= LONGEST_LINES


def test_the_statistics_are_those_of_real_traces():
    tokenizer, config = symbol_tokenizer(), RenderConfig(derivation_pattern=DERIVATION_PATTERN)
    samples = [render(trace, tokenizer, config) for trace in TRACES]
    assert not any(tokenizer.unk_token_id in sample.input_ids for sample in samples)
    lengths = np.array([len(sample) for sample in samples])
    short, long = np.quantile(lengths, [0.05, 0.95])
    assert long / short > 4.5 and lengths.max() < 1000
    behind = sum(trace.metadata["check_lines"] for trace in TRACES)
    ahead = sum(trace.metadata["derivation_lines"] for trace in TRACES)
    assert 0.76 < behind / (behind + ahead) < 0.82
    first, last = np.quantile([s.derivation_end / len(s) for s in samples], [0.05, 0.95])
    assert first < 0.2 and last > 0.6


@pytest.mark.parametrize("redundancy", [0.0, 0.5, 0.7])
def test_redundancy_is_the_share_of_lines_behind_the_derivation(redundancy):
    found = lines_behind(RecheckConfig(redundancy=redundancy, spread=0.4))
    assert fmean(found) == pytest.approx(redundancy / (1 - redundancy), rel=0.1, abs=1e-9)


@pytest.mark.parametrize("spread", [0.3, 0.8])
def test_spread_is_the_deviation_over_the_mean(spread):
    found = lines_behind(RecheckConfig(redundancy=0.75, spread=spread), 1500)
    assert pstdev(found) / fmean(found) == pytest.approx(spread, rel=0.12)


def test_without_spread_lengths_are_alike():
    found = lines_behind(RecheckConfig(redundancy=0.75, spread=0))
    assert max(found) - min(found) < 0.5


def test_rounding_at_random_keeps_the_mean():
    rng = random.Random(0)
    found = [round_at_random(2.25, rng) for _ in range(4000)]
    assert set(found) == {2, 3} and fmean(found) == pytest.approx(2.25, abs=0.03)


def test_the_source_is_read_by_name_and_seed():
    config = build(
        TraceConfig,
        {"source": "builtin:recheck", "num_traces": 5, "seed": 4, "recheck": {"most_steps": 5, "operators": "+"}},
    )
    traces, counts = read_traces(config)
    assert [t.key for t in traces] == [t.key for t in generate_rechecked(5, 4, config.recheck)]
    assert counts.read == 5 and "*" not in "".join(trace.cot for trace in traces)
    assert len({trace.prompt_key for trace in TRACES}) == len(TRACES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"redundancy": 1.0}, "expected 0 <= redundancy < 1"),
        ({"spread": 3}, "0 <= spread <= 2"),
        ({"redundancy": 0.95}, "take 140 lines on average"),
    ],
)
def test_what_cannot_be_made_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(RecheckConfig, changes)


def test_too_many_problems_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"builtin:recheck: 300 distinct problems asked for, 210 exist"):
        generate_rechecked(300, 0, RecheckConfig(fewest_steps=1, most_steps=1))
