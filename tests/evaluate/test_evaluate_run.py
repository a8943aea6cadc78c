"""The whole of an evaluation, with a model that writes what it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.engine.complete import Completion
from limbeck.errors import ConfigError
from limbeck.evaluate import run as evaluation
from limbeck.evaluate.answers import Verdict
from limbeck.evaluate.run import EvaluateConfig, evaluate
from limbeck.evaluate.tasks import Problem, Task, task_from_traces
from limbeck.models.tiny import ScratchConfig, scratch_model, symbol_tokenizer
from limbeck.traces.render import RenderConfig, render_prompt, stop_ids
from limbeck.traces.synthetic import generate as make_traces
from limbeck.traces.trace import Trace

TOKENIZER = symbol_tokenizer()
RENDER = RenderConfig()
STOPS = stop_ids(TOKENIZER, RENDER)


@dataclass(frozen=True)
class Scripted:
    """Stands for a model: what it writes after each prompt, stop token included."""

    scripts: Mapping[tuple[int, ...], Sequence[int]]


def write_scripts(
    model: Scripted,
    prompts: Sequence[Sequence[int]],
    config: EvaluateConfig,
    stop_ids: Sequence[int],
    seed: int,
    *,
    advance: Callable[[int], Any],
) -> list[list[Completion]]:
    """As the engine completes prompts, but by the scripts."""
    rows = []
    for prompt in prompts:
        script = list(model.scripts[tuple(prompt)])
        tokens = script[: config.max_new_tokens]
        rows.append([Completion(tokens, stopped=len(tokens) == len(script) and tokens[-1] in stop_ids)])
        advance(1)
    return rows


def prompt_of(messages: Sequence[Mapping[str, str]]) -> list[int]:
    return render_prompt(TOKENIZER, messages, RENDER)


def problem(text: str, reference: str | None) -> Problem:
    return Problem(messages=({"role": "user", "content": text},), reference=reference, key=text)


CASES = {
    # prompt: (reference, output, stops, verdict, answer, end marker)
    "1+1": ("2", "<think>\n1+1=2\n</think>\n\n2", True, "right", "2", True),
    "2+2": ("4", "<think>\n2+2=5\n</think>\n\n5", True, "wrong", "5", True),
    "3+3": ("6", "<think>\n3+3=6\n", True, "wrong", None, False),
    "4+4": ("8", "<think>\n4+4=8 8 8 8 8 8 8 8 8 8 8 8 8 8 8 8 8 8 8 8", False, "wrong", None, False),
    "5+4": (None, "<think>\n9\n</think>\n\n9", True, "unknown", "9", True),
    "6+3": ("9", "\n</think>\n\n9", True, "right", "9", True),
    "7+1": ("8", "<think>\n8\n</think>", True, "wrong", None, True),
    "8+1 </think> 9": ("9", "<think>\n", True, "wrong", None, False),
    "9+0": ("9", "9", True, "right", "9", False),
    "9+1": ("1", "0", True, "wrong", "0", False),
}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> tuple[Scripted, Task]:
    monkeypatch.setattr(evaluation, "complete", write_scripts)
    problems = tuple(problem(text, case[0]) for text, case in CASES.items())
    end = TOKENIZER.eos_token_id
    scripts = {
        tuple(prompt_of(p.messages)): [*TOKENIZER.encode(CASES[p.key][1], add_special_tokens=False), end]
        for p in problems
    }
    return Scripted(scripts), Task(name="sums", problems=problems, answer_style="exact")


def test_rows_say_what_happened(scripted: tuple[Scripted, Task], tmp_path: Path) -> None:
    model, task = scripted
    ended: list[int] = []
    config = EvaluateConfig(max_new_tokens=20, batch_size=3, timeout_seconds=60.0)
    result = evaluate(model, TOKENIZER, task, config, render_prompt=prompt_of, stop_ids=STOPS, advance=ended.append)
    assert sum(ended) == len(CASES)
    for row, (text, case) in zip(result.rows, CASES.items(), strict=True):
        reference, output, stops, verdict, answer, has_end_marker = case
        length = len(TOKENIZER.encode(output, add_special_tokens=False)) + 1
        assert row.key == text
        assert row.prompt == TOKENIZER.decode(prompt_of([{"role": "user", "content": text}]))
        assert row.outputs == [output if stops else TOKENIZER.decode(TOKENIZER.encode(output)[:20])]
        assert row.reference == reference
        assert row.verdicts == [verdict]
        assert row.answers == [answer]
        assert row.stopped == [stops]
        assert row.has_end_marker == [has_end_marker]
        assert row.output_tokens == [length if stops else 20]
    summary = result.summary
    assert summary["accuracy"] == summary["avg_at_n"] == summary["pass_at_k"] == 3 / 10
    assert summary["stop_rate"] == 9 / 10
    assert summary["end_marker_rate"] == 5 / 10
    assert summary["unknown_fraction"] == 1 / 10
    assert summary["generated_tokens"] == sum(row.output_tokens[0] for row in result.rows)
    assert summary["output_tokens"] == pytest.approx(summary["generated_tokens"] / 10)
    for name in ("accuracy", "avg_at_n", "pass_at_k", "stop_rate", "end_marker_rate", "output_tokens"):
        assert summary[f"{name}_low"] <= summary[name] <= summary[f"{name}_high"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    np.testing.assert_array_equal(result.scores, [1, 0, 0, 0, 0, 1, 0, 0, 1, 0])

    result.write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["verdicts"] for line in lines] == [row.verdicts for row in result.rows]
    assert [line["outputs"] for line in lines] == [row.outputs for row in result.rows]
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_rates_tell_what_a_score_is_made_of(scripted: tuple[Scripted, Task]) -> None:
    model, task = scripted
    config = EvaluateConfig(max_new_tokens=20, timeout_seconds=60.0)
    # Right, wrong, right without an answer, cut short, no reference; the others derive nothing.
    pattern = r"(?:\d\+\d=|<think>\n(?=\d\n)){answer}"
    result = evaluate(
        model, TOKENIZER, task, config, render_prompt=prompt_of, stop_ids=STOPS, derivation_pattern=pattern
    )
    derived = {row.key: row.derived for row in result.rows}
    assert [one.values[0] for one in derived.values()] == ["2", "5", "6", "8", "9", None, "8", None, None, None]
    assert [key for key, one in derived.items() if one.right[0]] == ["1+1", "3+3", "4+4", "7+1"]
    assert [key for key, one in derived.items() if one.is_answer[0]] == ["1+1", "2+2", "5+4"]
    assert (result.summary["derivation_right"], result.summary["answer_as_derived"]) == (0.4, 0.3)
    assert result.summary["derivation_right_low"] <= 0.4 <= result.summary["derivation_right_high"]


def test_config_overrides_the_task(scripted: tuple[Scripted, Task]) -> None:
    model, task = scripted
    config = EvaluateConfig(max_new_tokens=20, answer_style="boxed", timeout_seconds=60.0)
    result = evaluate(model, TOKENIZER, task, config, render_prompt=prompt_of, stop_ids=STOPS)
    assert [row.answers for row in result.rows] == [[None]] * len(CASES)
    assert result.summary["accuracy"] == 0.0


def test_end_marker_may_be_several_tokens(scripted: tuple[Scripted, Task]) -> None:
    model, task = scripted
    config = EvaluateConfig(max_new_tokens=20, timeout_seconds=60.0)
    result = evaluate(
        model, TOKENIZER, task, config, render_prompt=prompt_of, stop_ids=STOPS, end_marker="\n</think>\n\n"
    )
    expected = [True, True, False, False, True, True, False, False, False, False]
    assert [row.has_end_marker[0] for row in result.rows] == expected
    assert [row.verdicts[0] for row in result.rows] == [case[3] for case in CASES.values()]


def test_samples_of_a_real_model_are_counted_by_problem() -> None:
    model = scratch_model(ScratchConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)).eval()
    task = task_from_traces("chain", make_traces(5, seed=1, min_steps=1, max_steps=2))
    config = EvaluateConfig(
        max_new_tokens=6, temperature=1.0, num_samples=3, pass_k=2, batch_size=4, timeout_seconds=60.0
    )
    first, second = (
        evaluate(model, TOKENIZER, task, config, render_prompt=prompt_of, stop_ids=STOPS) for _ in range(2)
    )
    assert first.rows == second.rows
    assert [row.key for row in first.rows] == [p.key for p in task.problems]
    for row in first.rows:
        assert len(row.verdicts) == len(row.answers) == len(row.stopped) == len(row.output_tokens) == 3
        assert set(row.verdicts) <= {verdict.value for verdict in Verdict}
    assert first.summary["pass_k"] == 2
    assert first.summary["generated_tokens"] == sum(sum(row.output_tokens) for row in first.rows)


def test_task_from_traces_takes_prompts_and_references() -> None:
    traces = make_traces(4, seed=3, min_steps=2, max_steps=3)
    task = task_from_traces("chain", traces, "number", "math")
    assert (task.name, task.answer_style, task.checker) == ("chain", "number", "math")
    assert [p.reference for p in task.problems] == [trace.reference for trace in traces]
    assert [p.key for p in task.problems] == [trace.prompt_key for trace in traces]
    assert [p.messages for p in task.problems] == [trace.messages for trace in traces]


def test_task_without_problems_or_references_is_refused() -> None:
    with pytest.raises(ConfigError, match="aime: no problems"):
        task_from_traces("aime", [])
    bare = Trace(messages=({"role": "user", "content": "?"},), cot="x", answer="y")
    with pytest.raises(ConfigError, match="none of 2 problems has a reference"):
        task_from_traces("aime", [bare, bare])


@pytest.mark.parametrize(
    "fields",
    [
        {"pass_k": 2},
        {"pass_k": 0},
        {"num_samples": 4},
        {"num_samples": 4, "temperature": 1.0, "pass_k": 5},
        {"timeout_seconds": 0.0},
        {"timeout_seconds": float("nan")},
        {"num_checkers": 0},
        {"max_new_tokens": 0},
    ],
)
def test_bad_config_is_refused(fields: dict) -> None:
    with pytest.raises(ConfigError):
        EvaluateConfig(**fields)
