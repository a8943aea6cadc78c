"""A model on a task: generate, find the answers, check them, count with intervals.

1. Every prompt is completed `num_samples` times.
2. The answer is looked for after the first end marker. An output that opens a thought and never closes it has none;
   one that opens none is an answer as a whole.
3. Answers are checked in killable processes: right, wrong or unknown. A share counts unknown as not right;
   `unknown_fraction` says how much that can be.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from limbeck.config import checked
from limbeck.engine.complete import complete
from limbeck.engine.sampling import SamplingConfig
from limbeck.errors import ConfigError
from limbeck.evaluate.answers import AnswerStyle, Verdict, answer_part, extract_answer
from limbeck.evaluate.checking import CheckName, check_answers
from limbeck.evaluate.derivation import Derived, first_derived, rates_of
from limbeck.evaluate.metrics import (
    Interval,
    accuracy,
    avg_at_n,
    mean_output_tokens,
    pass_at_k,
    share_interval,
    stop_rate,
)
from limbeck.evaluate.tasks import Task

RESULTS_FILE = "results.jsonl"


@checked
class EvaluateConfig(SamplingConfig):
    """How a model is sampled and its answers are checked."""

    pass_k: int | None = None
    """k of pass@k, at most num_samples; num_samples when null."""
    seed: int = 0
    """Seed of sampling and of the bootstrap."""
    answer_style: AnswerStyle | None = None
    """Where the answer stands after the thought; the task's own when null."""
    checker: CheckName | None = None
    """How answers are compared: exact (text or number) or math (math-verify); the task's own when null."""
    timeout_seconds: float = 10.0
    """Wall-clock time for checking one answer; after it the answer is unknown."""
    num_checkers: int = 2
    """Processes that check answers."""

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more; found {self.seed}")
        if self.pass_k is not None and not 1 <= self.pass_k <= self.num_samples:
            raise ConfigError(f"pass_k must lie in 1 to num_samples ({self.num_samples}); found {self.pass_k}")
        if not 0 < self.timeout_seconds < float("inf"):
            raise ConfigError(f"timeout_seconds must be above 0; found {self.timeout_seconds}")
        if self.num_checkers < 1:
            raise ConfigError(f"num_checkers must be at least 1; found {self.num_checkers}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemResult:
    """What happened on one problem; every list has one entry a sample."""

    key: str
    prompt: str
    """The text that the model was given, template included."""
    reference: str | None
    verdicts: list[str]
    """right, wrong or unknown."""
    outputs: list[str]
    """What the model wrote, special tokens included, without the one that ended it."""
    answers: list[str | None]
    """The extracted answer; None when the thought is never closed or no answer follows it."""
    output_tokens: list[int]
    stopped: list[bool]
    has_end_marker: list[bool]
    derived: Derived | None = None
    """What was derived first, where the task tells how a derivation is written."""


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Rows in the order of the task's problems, and their summary."""

    rows: list[ProblemResult]
    summary: dict[str, Any]
    """Plain numbers by name; `x_low` and `x_high` are the ends of the 95 % interval of `x`."""

    @property
    def scores(self) -> np.ndarray:
        """float64 [P]: share of right outputs of each problem, what `paired_retention` reads."""
        return _table(self.rows, "verdicts", Verdict.RIGHT.value).mean(1)

    def write(self, directory: Path) -> None:
        """Write the rows to `results.jsonl` in an existing directory, through a temporary name."""
        partial = directory / (RESULTS_FILE + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            for row in self.rows:
                file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        partial.replace(directory / RESULTS_FILE)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    config: EvaluateConfig,
    *,
    render_prompt: Callable[[Sequence[Mapping[str, str]]], Sequence[int]],
    stop_ids: Sequence[int],
    start_marker: str = "<think>",
    end_marker: str = "</think>",
    derivation_pattern: str | None = None,
    advance: Callable[[int], Any] = lambda _: None,
) -> EvaluationResult:
    """Score `model` on `task`.

    Args:
      model: a causal LM.
      tokenizer: of that model; decodes the outputs.
      task: the problems.
      config: sampling and checking.
      render_prompt: from chat messages to prompt token ids, the generation prompt included. The template may already
        open the thought there.
      stop_ids: tokens that end an output.
      start_marker: opens the thought, in the prompt or in the output; may be several tokens.
      end_marker: closes the thought; may be several tokens.
      derivation_pattern: how a derivation is written, {answer} in the place of the value; None when it is not known.
      advance: called with the number of outputs that have just ended.
    """
    prompts = [list(render_prompt(problem.messages)) for problem in task.problems]
    start = time.perf_counter()
    completions = complete(model, prompts, config, stop_ids, config.seed, advance=advance)
    generated = time.perf_counter()
    style = config.answer_style or task.answer_style
    texts = [_decoded(tokenizer, prompt) for prompt in prompts]
    outputs = [[_decoded(tokenizer, sample.text_ids) for sample in samples] for samples in completions]
    is_open = [text.rstrip().endswith(start_marker) for text in texts]
    parts = [
        [answer_part(output, start_marker, end_marker, opened) for output in samples]
        for opened, samples in zip(is_open, outputs, strict=True)
    ]
    answers = [
        [None if part is None else extract_answer(part, style, problem.reference) for part in samples]
        for problem, samples in zip(task.problems, parts, strict=True)
    ]
    verdicts = _check(task, answers, config)
    derived: list[Derived] | None = None
    if derivation_pattern is not None:
        derived = _derive(task, outputs, answers, config, derivation_pattern, end_marker)
    rows = [
        ProblemResult(
            key=problem.key,
            prompt=texts[index],
            reference=problem.reference,
            verdicts=[verdict.value for verdict in verdicts[index]],
            outputs=outputs[index],
            answers=answers[index],
            output_tokens=[len(sample.token_ids) for sample in completions[index]],
            stopped=[sample.stopped for sample in completions[index]],
            has_end_marker=[end_marker in output for output in outputs[index]],
            derived=derived[index] if derived is not None else None,
        )
        for index, problem in enumerate(task.problems)
    ]
    seconds = {"seconds": generated - start, "check_seconds": time.perf_counter() - generated}
    return EvaluationResult(rows, summarise(rows, config) | seconds)


def summarise(rows: Sequence[ProblemResult], config: EvaluateConfig) -> dict[str, Any]:
    """The metrics of some rows: `accuracy` with `accuracy_low` and `accuracy_high`, and so on."""
    right = _table(rows, "verdicts", Verdict.RIGHT.value)
    unknown = _table(rows, "verdicts", Verdict.UNKNOWN.value)
    output_tokens = np.array([row.output_tokens for row in rows])
    num_samples, seed = config.num_samples, config.seed
    pass_k = config.pass_k or num_samples
    intervals: dict[str, Interval] = {
        "accuracy": accuracy(right, seed),
        "avg_at_n": avg_at_n(right, num_samples, seed),
        "pass_at_k": pass_at_k(right, pass_k, seed),
        "stop_rate": stop_rate(_table(rows, "stopped", True), seed),
        "end_marker_rate": share_interval(_table(rows, "has_end_marker", True), seed),
        "output_tokens": mean_output_tokens(output_tokens, seed),
    }
    known = [row.derived for row in rows if row.derived is not None]
    if len(known) == len(rows):
        intervals |= {name: share_interval(table, seed) for name, table in rates_of(known).items()}
    summary: dict[str, Any] = {"num_samples": num_samples, "pass_k": pass_k}
    for name, interval in intervals.items():
        summary |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return summary | {"unknown_fraction": float(unknown.mean()), "generated_tokens": int(output_tokens.sum())}


def problem_scores(evaluation: Path) -> dict[str, float]:
    """Share of right samples of every problem by its key, from the directory of an evaluation that has some."""
    file = evaluation / RESULTS_FILE
    if not file.is_file():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {row["key"]: sum(v == "right" for v in row["verdicts"]) / len(row["verdicts"]) for row in rows}


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    # Special tokens stay: the end marker may be one.
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _check(task: Task, answers: list[list[str | None]], config: EvaluateConfig) -> list[list[Verdict]]:
    """The verdict of every answer against its problem's reference."""
    references = [[problem.reference] * len(samples) for problem, samples in zip(task.problems, answers, strict=True)]
    return _compare(task, answers, references, config)


def _compare(
    task: Task, answers: list[list[str | None]], references: list[list[str | None]], config: EvaluateConfig
) -> list[list[Verdict]]:
    pairs = [pair for samples in zip(answers, references, strict=True) for pair in zip(*samples, strict=True)]
    flat = iter(check_answers(pairs, config.checker or task.checker, config.timeout_seconds, config.num_checkers))
    return [[next(flat) for _ in samples] for samples in answers]


def _derive(
    task: Task,
    outputs: list[list[str]],
    answers: list[list[str | None]],
    config: EvaluateConfig,
    pattern: str,
    end_marker: str,
) -> list[Derived]:
    """What every output derived first, against the reference and against its answer."""
    values = [[first_derived(output, pattern, end_marker) for output in samples] for samples in outputs]
    right, is_answer = _check(task, values, config), _compare(task, answers, values, config)
    return [
        Derived(values=found, right=_are_right(rights), is_answer=_are_right(same))
        for found, rights, same in zip(values, right, is_answer, strict=True)
    ]


def _are_right(verdicts: list[Verdict]) -> list[bool]:
    return [verdict is Verdict.RIGHT for verdict in verdicts]


def _table(rows: Sequence[ProblemResult], name: str, wanted: object) -> np.ndarray:
    """bool [P N]: where a field of the rows has the wanted value."""
    return np.array([[value == wanted for value in getattr(row, name)] for row in rows])
