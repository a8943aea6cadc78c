"""Public benchmarks by name, on rows made here: prompts, shots, targets and the harness's filters."""

from __future__ import annotations

import csv
import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from limbeck.errors import ConfigError, LimbeckError, TraceFormatError
from limbeck.evaluate import benchmark_data
from limbeck.evaluate.benchmark_data import BenchmarkConfig, benchmark_task
from limbeck.evaluate.benchmarks import BENCHMARKS
from limbeck.evaluate.harness import by_choice, by_regex, choice_metrics, cut_at, gsm8k_metrics
from limbeck.traces.files import Located

SUMS = [
    {"question": f"How much is {n} and 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1:,}"} for n in range(1995, 2005)
]
MATH = [{"problem": "Halve $x$.", "solution": "It is $\\boxed{\\frac{x}{2}}$.", "answer": "\\frac{x}{2}", "level": 1}]
AIME = [{"ID": "2024-I-1", "Problem": "Find $n$.", "Solution": "...", "Answer": 42}]
MMLU = [
    {
        "question": " Which is a colour? ",
        "subject": "high_school_art",
        "choices": ["ox", "red", "up", "two"],
        "answer": 1,
    }
]
GPQA = [
    {
        "Question": "Which holds?",
        "Correct Answer": "both  [title]",
        "Incorrect Answer 1": "none",
        "Incorrect Answer 2": "the first",
        "Incorrect Answer 3": "the second",
    }
]


def written(directory: Path, **splits: list[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return directory


def task(name: str, data: Path, **more: Any) -> Any:
    return benchmark_task(BenchmarkConfig(name=name, data=str(data), **more))


def test_gsm8k_has_five_shots_drawn_as_the_harness_draws_them(tmp_path: Path) -> None:
    data = written(tmp_path / "gsm8k" / "main", train=SUMS[:8], test=SUMS[8:])
    first, second = task("gsm8k", data.parent).problems
    assert (first.reference, second.reference) == ("2004", "2005")
    drawn = random.Random(1234)
    for problem, row in zip((first, second), SUMS[8:], strict=True):
        *shots, asked = problem.messages
        assert asked == {"role": "user", "content": f"Question: {row['question']}\nAnswer:"}
        chosen = drawn.sample(SUMS[:8], 5)
        assert [shot["content"] for shot in shots[1::2]] == [shot["answer"] for shot in chosen]
        assert [shot["content"] for shot in shots[::2]] == [f"Question: {shot['question']}\nAnswer:" for shot in chosen]
    assert len(task("gsm8k", data.parent, num_shots=0, num_problems=1).problems[0].messages) == 1


def test_a_single_file_has_no_shots(tmp_path: Path) -> None:
    data = written(tmp_path, test=SUMS) / "test.jsonl"
    assert len(task("gsm8k", data, num_shots=0).problems) == 10
    with pytest.raises(
        TraceFormatError, match="shots are drawn from the split train; give a directory with both, or set"
    ):
        task("gsm8k", data)
    with pytest.raises(TraceFormatError, match="9 shots are asked for, and its split train has 8 rows"):
        task("gsm8k", written(tmp_path / "both", train=SUMS[:8], test=SUMS[8:]), num_shots=9)


def test_math_500_has_four_fixed_shots(tmp_path: Path) -> None:
    (problem,) = task("math-500", written(tmp_path, test=MATH)).problems
    assert problem.reference == "\\frac{x}{2}"
    assert problem.messages[-1]["content"] == "Problem:\nHalve $x$.\n\nSolution:"
    assert len(problem.messages) == 9
    assert all("I hope it is correct." in shot["content"] for shot in problem.messages[1:-1:2])
    without = written(tmp_path / "older", test=[{k: v for k, v in MATH[0].items() if k != "answer"}])
    assert task("math-500", without, num_shots=0).problems[0].reference == "\\frac{x}{2}"


@pytest.mark.parametrize(("name", "split"), [("aime24", "train"), ("aime25", "test")])
def test_aime_is_asked_plainly(tmp_path: Path, name: str, split: str) -> None:
    rows = AIME if name == "aime24" else [{key.lower(): value for key, value in AIME[0].items()}]
    (problem,) = task(name, written(tmp_path, **{split: rows})).problems
    assert problem.messages == ({"role": "user", "content": "Question: Find $n$.\nAnswer:"},)
    assert problem.reference == "42"


def test_mmlu_describes_its_subject(tmp_path: Path) -> None:
    (problem,) = task("mmlu", written(tmp_path, test=MMLU)).problems
    system, asked = problem.messages
    about = "The following are multiple choice questions (with answers) about high school art.\n\n"
    assert system == {"role": "system", "content": about}
    assert asked["content"] == "Q: Which is a colour?\n(A) ox (B) red (C) up (D) two\nA: Let's think step by step."
    assert problem.reference == "B"


def test_gpqa_shuffles_the_choices_by_its_seed(tmp_path: Path) -> None:
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(GPQA[0]))
        table.writeheader()
        table.writerows(GPQA * 8)
    first, again, other = (task("gpqa", tmp_path, seed=seed).problems for seed in (3, 3, 4))
    assert first == again != other
    letters = {problem.reference for problem in first}
    assert len(letters) > 1
    for problem in first:
        assert problem.reference is not None
        assert f"({problem.reference}) both . " in problem.messages[-1]["content"]
        assert problem.messages[-1]["content"].endswith("\nLet's think step by step: ")


def test_a_row_of_another_data_set_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError) as caught:
        task("gsm8k", written(tmp_path, test=MATH), num_shots=0)
    message = str(caught.value)
    assert message.startswith(f"benchmark gsm8k: {tmp_path}: row 1 is none of openai/gsm8k") and "problem" in message
    with pytest.raises(TraceFormatError, match="no such file or directory; `hub` loads openai/gsm8k from the hub"):
        task("gsm8k", tmp_path / "nowhere")


def test_the_hub_is_asked_only_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read_hub(*names: Any) -> Any:
        asked.append(names)
        return iter([Located("row", row) for row in SUMS])

    monkeypatch.setattr(benchmark_data, "read_hub", read_hub)
    task("gsm8k", written(tmp_path, train=SUMS, test=SUMS))
    assert asked == []
    task("gsm8k", Path("hub"))
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]


def test_where_the_rows_are_has_to_be_said() -> None:
    with pytest.raises(ConfigError, match=r"set benchmark\.data to a local copy, or to hub to load cais/mmlu from the"):
        BenchmarkConfig(name="mmlu")


@pytest.mark.parametrize("fields", [{"num_shots": -1}, {"num_problems": 0}, {"name": "gsm9k"}])
def test_bad_config_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(LimbeckError):
        BenchmarkConfig(**{"name": "gsm8k", "data": "x", **fields})


def test_ifeval_needs_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(benchmark_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="scored by lm_eval, which is not installed: pip install"):
        BenchmarkConfig(name="ifeval", data="x")


def test_ifeval_is_measured_by_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = types.ModuleType("lm_eval.tasks.ifeval.utils")

    def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        follows = ["," not in results[0], len(results[0]) > 3]
        return {
            "prompt_level_strict_acc": all(follows),
            "inst_level_strict_acc": follows,
            "prompt_level_loose_acc": any(follows),
            "inst_level_loose_acc": follows,
        }

    utils.process_results = process_results  # type: ignore[attr-defined]
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval.utils", utils)
    monkeypatch.setattr(benchmark_data.importlib.util, "find_spec", lambda name: object())
    row = {"key": 1, "prompt": "No comma, please.", "instruction_id_list": ["a", "b"], "kwargs": [{}, {}]}
    (problem,) = task("ifeval", written(tmp_path, train=[row])).problems
    assert problem.messages == ({"role": "user", "content": "No comma, please."},) and problem.reference is None
    measure = BENCHMARKS["ifeval"].measure
    assert measure is not None
    assert measure(problem.metadata, "a, b, c") == {
        "prompt_level_strict_acc": 0.0,
        "prompt_level_loose_acc": 1.0,
        "inst_level_strict_acc": 0.5,
        "inst_level_loose_acc": 0.5,
    }


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("It is 4.\n#### 4", 1, 1),
        ("It is 4.", 0, 0),  # The full stop belongs to the match, and the harness takes one off at the end only.
        ("It is $4", 0, 1),
        ("It is 4", 0, 1),
        ("#### 5", 0, 0),
        ("#### 4\nQuestion: and 5?", 1, 1),
        ("none", 0, 0),
    ],
)
def test_gsm8k_filters(text: str, strict: float, flexible: float) -> None:
    found = gsm8k_metrics(text, "2 + 2 = 4\n#### 4")
    if text == "It is 4.":
        assert found == {"strict_match": 0.0, "flexible_extract": 1.0}
    else:
        assert found == {"strict_match": strict, "flexible_extract": flexible}


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("The answer is (B).", 1, 1),
        ("So the answer is (B)!", 1, 1),
        ("I take (A), no, (B)", 0, 1),
        ("I take red.", 0, 1),
        ("My pick: B", 0, 1),
        ("The answer is (C).", 0, 0),
        ("", 0, 0),
    ],
)
def test_choice_filters(text: str, strict: float, flexible: float) -> None:
    pattern = r"((?<=The answer is )(.*)(?=.)|(?<=answer is )(.*)(?=.))"
    found = choice_metrics(text, "(B)", ["ox", "red", "up", "two"], pattern, ("</s>",))
    assert found == {"strict_match": strict, "flexible_extract": flexible}


def test_parts_of_the_filters() -> None:
    assert cut_at("a Q: b", ("Q:", "</s>")) == "a "
    assert by_regex("x", "(y)", 0) == "[invalid]"
    assert by_choice("nothing here", ["ox", "red"]) == "[invalid]"
