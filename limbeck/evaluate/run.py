"""Score a model on a task: generate, take the answer behind the thought, check it, summarise with intervals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import ConfigError
from limbeck.evaluate.answers import AnswerStyle, Verdict, extract_answer
from limbeck.evaluate.metrics import mean_interval, pass_at_k
from limbeck.evaluate.tasks import Task
from limbeck.evaluate.workers import AnswerChecker, CheckName
from limbeck.models.generate import Completion, SamplingConfig, generate


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """How a model is sampled and its answers are checked."""

    max_new_tokens: int = 512
    """Longest completion in tokens."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this share of the probability."""
    num_samples: int = 1
    """Completions a problem: n of avg@n and pass@k."""
    batch_size: int = 128
    """Sequences decoded at once."""
    seed: int = 0
    """Seed of the draws."""
    end_marker: str = "</think>"
    """The answer is what follows it; a completion without it has no answer and is wrong."""
    needs_thought: bool = True
    """False for models that answer without a thought: the whole completion is then read when there is no marker."""
    answer_style: AnswerStyle = "auto"
    """Where the answer stands behind the thought: boxed, hashes, phrase, number, exact (all of it); auto tries in turn."""
    checker: CheckName = "exact"
    """exact: equal strings or plain numbers; math: mathematical equality by math-verify."""
    timeout_seconds: float = 5.0
    """Longest time one answer may take to check; its verdict is unknown then."""

    def __post_init__(self) -> None:
        self.sampling()
        if not self.timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds must be greater than 0; found {self.timeout_seconds}")
        if self.needs_thought and not self.end_marker:
            raise ConfigError("end_marker must not be empty when needs_thought is set")

    def sampling(self) -> SamplingConfig:
        """The part that the sampler reads."""
        names = ("max_new_tokens", "temperature", "top_p", "num_samples", "batch_size", "seed")
        return SamplingConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Rows, one a problem, and their summary."""

    rows: list[dict[str, Any]]
    summary: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Write `results.jsonl` into `directory`."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        (directory / "results.jsonl").write_text(lines, encoding="utf-8")


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    config: EvaluateConfig,
    *,
    render_prompt: Callable[[Sequence[Mapping[str, str]]], list[int]],
    stop_ids: Sequence[int],
    advance: Callable[[int], Any] | None = None,
) -> EvaluationResult:
    """Score `model` on `task`.

    Args:
      model: a causal LM.
      tokenizer: decodes its tokens.
      render_prompt: chat messages to prompt tokens, generation prompt included.
      stop_ids: tokens that end a completion.
      advance: called with the number of completions that have just ended.
    """
    prompts = [render_prompt(problem.messages) for problem in task.problems]
    start = time.perf_counter()
    samples = generate(model, prompts, config.sampling(), stop_ids, tokenizer.pad_token_id, advance)
    generate_seconds = time.perf_counter() - start
    texts = [[tokenizer.decode(completion.text_ids) for completion in group] for group in samples]
    answers = [[read_answer(text, config) for text in group] for group in texts]
    pairs = [
        (answer, problem.reference)
        for problem, group in zip(task.problems, answers, strict=True)
        for answer in group
        if answer is not None
    ]
    with AnswerChecker(config.checker, config.timeout_seconds) as checker:
        checked = iter(checker.verdicts(pairs))
    rows = []
    for problem, group, text_group, answer_group in zip(task.problems, samples, texts, answers, strict=True):
        verdicts = [Verdict.WRONG if answer is None else next(checked) for answer in answer_group]
        rows.append(_row(problem.key, problem.reference, group, text_group, answer_group, verdicts, config))
    return EvaluationResult(rows, summarise(rows, config, generate_seconds))


def read_answer(text: str, config: EvaluateConfig) -> str | None:
    """The short answer of a completion; None when it never closes its thought, or nothing follows."""
    _, marker, rest = text.rpartition(config.end_marker)
    if not marker and config.needs_thought:
        return None
    return extract_answer(rest if marker else text, config.answer_style)


def summarise(rows: Sequence[Mapping[str, Any]], config: EvaluateConfig, generate_seconds: float) -> dict[str, Any]:
    """Means over problems with intervals. Accuracy is avg@n, the mean over a problem's n samples."""

    def column(value: Callable[[Mapping[str, Any]], Sequence[float]]) -> np.ndarray:
        return np.array([float(np.mean(value(row))) for row in rows])

    right = [sum(verdict == "right" for verdict in row["verdicts"]) for row in rows]
    summary: dict[str, Any] = {}
    columns = {
        "accuracy": np.array(right) / config.num_samples,
        "stop_rate": column(lambda row: row["stopped"]),
        "end_marker_rate": column(lambda row: row["has_end_marker"]),
        "output_tokens": column(lambda row: row["output_tokens"]),
    }
    for name, values in columns.items():
        interval = mean_interval(values)
        summary |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    k = config.num_samples
    if k > 1:
        best = mean_interval([pass_at_k(count, k, k) for count in right])
        summary |= {f"pass_at_{k}": best.value, f"pass_at_{k}_low": best.low, f"pass_at_{k}_high": best.high}
    unknown = column(lambda row: [verdict == "unknown" for verdict in row["verdicts"]])
    generated = sum(sum(row["output_tokens"]) for row in rows)
    return summary | {
        "num_samples": k,
        "unknown_fraction": float(unknown.mean()),
        "generated_tokens": generated,
        "generate_seconds": generate_seconds,
    }


def _row(
    key: str,
    reference: str,
    completions: Sequence[Completion],
    texts: Sequence[str],
    answers: Sequence[str | None],
    verdicts: Sequence[Verdict],
    config: EvaluateConfig,
) -> dict[str, Any]:
    return {
        "key": key,
        "reference": reference,
        "answers": list(answers),
        "verdicts": [verdict.value for verdict in verdicts],
        "stopped": [completion.stopped for completion in completions],
        "has_end_marker": [config.end_marker in text for text in texts],
        "output_tokens": [len(completion.token_ids) for completion in completions],
        "texts": list(texts),
    }
