"""Verification: verdicts, pass rates, filters and decontamination, each counted."""

import json

import pytest

from limbeck.checkpoint import Checkpoint
from limbeck.config import build
from limbeck.errors import ConfigError
from limbeck.evaluate.overlap import Overlap
from limbeck.evaluate.verify import VerifyConfig, pass_rates, run
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.trace import Trace, write_jsonl

LONG = "A train leaves the station at nine and travels sixty miles an hour for {} hours ; how far does it go ?"


def trace(question, answer, reference="4", cot="because", **rest):
    messages = ({"role": "user", "content": question},)
    return Trace(messages=messages, cot=cot, answer=answer, reference=reference, **rest)


def verify(tmp_path, traces, **changes):
    source = tmp_path / "traces.jsonl"
    write_jsonl(traces, source)
    tree = {"traces": {"source": str(source)}, "checker": "exact", "num_checkers": 1, **changes}
    result = run(build(VerifyConfig, tree), tmp_path / "out").manifest["counts"]
    kept, _ = read_traces(TraceConfig(source=str(tmp_path / "out" / "traces.jsonl")))
    return result, kept


def test_checks_counts_and_keeps_pass_rates(tmp_path):
    traces = [trace("a", "4"), trace("a", "5"), trace("a", "4.0"), trace("b", "4", reference=None), trace("c", "6")]
    result, kept = verify(tmp_path, traces)
    assert [item.answer for item in kept] == ["4", "4.0"] and all(item.correct for item in kept)
    assert result["verdicts"] == {"right": 2, "wrong": 2, "unknown": 1}
    manifest = Checkpoint(tmp_path / "out").manifest
    assert manifest["counts"]["dropped"] == {"wrong answer": 2, "unknown answer": 1}
    rates = json.loads((tmp_path / "out" / "pass_rates.json").read_text())
    assert rates[traces[0].prompt_key] == {"right": 2, "wrong": 1, "unknown": 0, "pass_rate": 2 / 3}
    assert rates[traces[3].prompt_key]["pass_rate"] is None
    assert kept[0].metadata["pass_rate"] == pytest.approx(2 / 3)


def test_math_answers_are_compared_as_mathematics(tmp_path):
    result, _ = verify(tmp_path, [trace("a", "\\boxed{\\frac{1}{2}}", reference="0.5")], checker="math")
    assert result["verdicts"] == {"right": 1}


def test_filters_by_pass_rate(tmp_path):
    traces = [trace("easy", "4"), trace("easy", "4 "), trace("half", "4"), trace("half", "7"), trace("hard", "9")]
    result, kept = verify(tmp_path, traces, min_pass_rate=0.1, max_pass_rate=0.9, keep="all")
    assert [item.messages[0]["content"] for item in kept] == ["half", "half"]
    assert Checkpoint(tmp_path / "out").manifest["counts"]["dropped"] == {"pass rate out of range": 3}
    assert result["dropped"] == {"pass rate out of range": 3}


def test_outputs_without_a_trace_count_as_wrong(tmp_path):
    item = trace("a", "4")
    (tmp_path / "skipped.json").write_text(json.dumps([{"prompt": item.prompt_key, "sample": 1}]))
    _, kept = verify(tmp_path, [item])
    assert kept[0].metadata["pass_rate"] == 0.5


def test_filters_by_length_in_characters_and_tokens(tmp_path):
    traces = [trace("a", "4", cot="x"), trace("b", "4", cot="x" * 30), trace("c", "4", cot="x" * 90)]
    result, kept = verify(tmp_path, traces, min_chars=5, max_chars=60)
    assert [len(item.cot) for item in kept] == [30]
    assert result["dropped"] == {"too short": 1, "too long in characters": 1}


def test_filters_by_length_in_tokens(tmp_path):
    source = {"source": "builtin:chain", "num_traces": 8, "chain_min_steps": 1, "chain_max_steps": 4}
    config = {"traces": source, "checker": "exact", "num_checkers": 1, "tokenizer": "tiny-teacher", "max_tokens": 60}
    result = run(build(VerifyConfig, config), tmp_path / "out").manifest["counts"]
    assert 0 < result["dropped"]["too long in tokens"] < 8


def test_drops_what_overlaps_with_evaluation_problems(tmp_path):
    tests = tmp_path / "tests.jsonl"
    write_jsonl([trace(LONG.format(7), "420"), trace("2 + 2", "4")], tests)
    quoted = trace("Solve this. " + LONG.format(9), "4")
    traces = [quoted, trace("2 + 2", "4"), trace("what is 2 + 2 and then some", "4"), trace("other", "4")]
    result, kept = verify(tmp_path, traces, evaluation=[{"source": str(tests)}])
    assert result["dropped"] == {"overlap with an evaluation problem": 2}
    assert [item.messages[0]["content"] for item in kept] == ["what is 2 + 2 and then some", "other"]


def test_the_length_of_a_run_decides():
    problems = [trace(LONG.format(7), "420")]
    item = trace("a train leaves the station at ten", "1")
    assert not Overlap(problems, 13).has(item)
    assert Overlap(problems, 6).has(item)


def test_pass_rates_count_unknown_on_neither_side():
    items = [trace("a", "4", correct=True), trace("a", "4", correct=None)]
    assert pass_rates(items)[items[0].prompt_key]["pass_rate"] == 1.0


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no trace is left of 1"):
        verify(tmp_path, [trace("a", "5")])


@pytest.mark.parametrize(
    "changes", [{"min_pass_rate": 0.9, "max_pass_rate": 0.1}, {"max_tokens": 5}, {"ngram": 0}, {"evaluation": [{}]}]
)
def test_bad_configs_are_refused(changes):
    with pytest.raises(ConfigError):
        build(VerifyConfig, {"traces": {"source": "x.jsonl"}, **changes})
