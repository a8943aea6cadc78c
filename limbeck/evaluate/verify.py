"""The stage `traces verify`: check every answer, then filter by verdict, pass rate, length and overlap with test sets.

1. Answers are compared with the reference in killable processes: right, wrong or unknown.
2. A prompt's pass rate is right / (right + wrong) over all its traces; unknown ones count on neither side. Outputs
   that `traces generate` could not use (`skipped.json` beside the traces) answered nothing and count as wrong.
3. Each trace that goes is counted under its first reason; nothing goes quietly.

Checking is quick beside generating, so an interrupted run starts anew.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from limbeck.checkpoint import Checkpoint, hash_path, output_directory, write_json, write_manifest
from limbeck.config import checked
from limbeck.errors import CheckpointError, ConfigError
from limbeck.evaluate.answers import AnswerStyle, Verdict, extract_answer
from limbeck.evaluate.checking import CheckName, Pair, check_answers
from limbeck.evaluate.overlap import Overlap
from limbeck.models.load import load_tokenizer
from limbeck.progress import bar
from limbeck.runner.place import Prepared
from limbeck.stage import How, Place
from limbeck.traces.counts import tell
from limbeck.traces.generation import SKIPPED_FILE, TRACES_FILE, read_prompts
from limbeck.traces.record import REFERENCE_COLUMNS
from limbeck.traces.render import RenderConfig
from limbeck.traces.render_turns import samples_of
from limbeck.traces.sources import TraceConfig, path_of, read_traces
from limbeck.traces.trace import Trace, write_jsonl

RATES_FILE = "pass_rates.json"
ANSWERS_A_TASK = 1000
"""On Ray: checkers take some seconds to start, and start for each task."""


@checked
class VerifyConfig:
    """Which traces, how their answers are checked, and which of them stay."""

    traces: TraceConfig
    """Where the traces come from; those without a reference answer are unknown."""
    checker: CheckName = "math"
    """How answers are compared: math (math-verify) or exact (text or number)."""
    answer_style: AnswerStyle = "auto"
    """Where the answer stands after the thought."""
    timeout_seconds: float = 10.0
    """Wall-clock time for checking one answer; after it the answer is unknown."""
    num_checkers: int = 2
    """Processes that check answers, here or in each task on Ray."""
    keep: Literal["right", "not_wrong", "all"] = "right"
    """Verdicts that stay: right only, right and unknown, or all of them."""
    min_pass_rate: float = 0.0
    """Least share of right answers among the checked ones of a prompt."""
    max_pass_rate: float = 1.0
    """Greatest such share; below 1, prompts that are always answered right go."""
    min_chars: int = 0
    """Shortest thought and answer together, in characters."""
    max_chars: int | None = None
    """Longest thought and answer together, in characters; null sets no limit."""
    tokenizer: str | None = None
    """Model whose tokenizer counts the tokens; needed for max_tokens."""
    max_tokens: int | None = None
    """Longest trace in tokens, prompt included; null sets no limit."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How text becomes tokens, where they are counted."""
    evaluation: list[TraceConfig] = field(default_factory=list)
    """Evaluation problems: a trace whose prompt shares a run of ngram words with one of theirs goes."""
    ngram: int = 13
    """Words of such a run. 13 is GPT-3's choice (arXiv 2005.14165, appendix C): shorter ones meet in the boilerplate of
    problems, longer ones miss quoted parts. A shorter evaluation problem must be equal as a whole."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_pass_rate <= self.max_pass_rate <= 1:
            raise ConfigError(
                f"pass rates: {self.min_pass_rate} to {self.max_pass_rate}; expected 0 <= min_pass_rate <= "
                "max_pass_rate <= 1"
            )
        if (self.max_tokens is None) != (self.tokenizer is None):
            raise ConfigError("max_tokens and tokenizer go together: set both or neither")
        if self.ngram < 1 or self.num_checkers < 1 or not 0 < self.timeout_seconds < float("inf"):
            raise ConfigError("ngram and num_checkers must be at least 1, timeout_seconds above 0 and finite")


def run(config: VerifyConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `traces.jsonl`, `pass_rates.json` and a manifest into `out`.

    Raises: ConfigError when no trace is left.
    """
    traces, read = read_traces(config.traces)
    tell(read.lines())
    checked = check(traces, config, how.on)
    rates = pass_rates(checked, _unusable(path_of(config.traces.source)))
    reasons = reasons_against(checked, rates, config)
    kept = [trace for trace, reason in zip(checked, reasons, strict=True) if reason is None]
    dropped = Counter(reason for reason in reasons if reason is not None)
    if not kept:
        raise ConfigError(_nothing_left(config, traces, dropped))
    verdicts = Counter(_name(trace.correct) for trace in checked)
    counts = {"read": asdict(read), "verdicts": dict(verdicts), "kept": len(kept), "dropped": dict(dropped)}
    with output_directory(out, overwrite=how.overwrite) as working:
        write_jsonl((_with_rate(trace, rates) for trace in kept), working / TRACES_FILE)
        write_json(working / RATES_FILE, rates)
        source = path_of(config.traces.source)
        inputs = {"traces": hash_path(source)} if source.exists() else {}
        metrics = {"kept": len(kept), **verdicts, "dropped": sum(dropped.values())}
        write_manifest(working, stage="traces verify", config=config, inputs=inputs, metrics=metrics, counts=counts)
    return Checkpoint(out)


def _nothing_left(config: VerifyConfig, traces: Sequence[Trace], dropped: Mapping[str, int]) -> str:
    text = f"{config.traces.source}: no trace is left of {len(traces)} ({dict(dropped)})"
    if any(trace.reference is not None for trace in traces):
        return f"{text}; filter less."
    columns = ", ".join(sorted({name for trace in traces for name in trace.metadata})[:8]) or "none"
    return (
        f"{text}: none has a reference answer to check against. One is read from {', '.join(REFERENCE_COLUMNS)}; other "
        f"columns here are {columns} (fields can rename one). keep not_wrong keeps what cannot be checked."
    )


def check(traces: Sequence[Trace], config: VerifyConfig, on: Place = "local") -> list[Trace]:
    """The traces with `correct` as the checker finds it; None where it cannot decide."""
    pairs = [
        (
            None if trace.answer is None else extract_answer(trace.answer, config.answer_style, trace.reference),
            trace.reference,
        )
        for trace in traces
    ]
    with bar("checking", len(pairs)) as progress:
        if on == "ray":
            verdicts = _verdicts_on_ray(config, pairs, progress.advance)
        else:
            verdicts = _verdicts(config, pairs, progress.advance)
    known = {Verdict.RIGHT: True, Verdict.WRONG: False}
    return [replace(trace, correct=known.get(verdict)) for trace, verdict in zip(traces, verdicts, strict=True)]


def _verdicts(config: VerifyConfig, pairs: Sequence[Pair], advance: Callable[[int], Any] | None) -> list[Verdict]:
    return check_answers(pairs, config.checker, config.timeout_seconds, config.num_checkers, advance)


def _verdicts_on_ray(config: VerifyConfig, pairs: Sequence[Pair], advance: Callable[[int], Any]) -> list[Verdict]:
    starts = range(0, len(pairs), ANSWERS_A_TASK)
    parts = [(start, pairs[start : start + ANSWERS_A_TASK]) for start in starts]
    verdicts = [Verdict.UNKNOWN] * len(pairs)
    for (start, part), found in Prepared(_nothing, "ray", config.num_checkers).map(partial(_check_part, config), parts):
        verdicts[start : start + len(part)] = found
        advance(len(part))
    return verdicts


def _nothing() -> None:
    return None


def _check_part(config: VerifyConfig, _: None, part: tuple[int, Sequence[Pair]]) -> list[Verdict]:
    return _verdicts(config, part[1], None)


def pass_rates(traces: Iterable[Trace], unusable: Mapping[str, int] | None = None) -> dict[str, dict[str, Any]]:
    """By prompt key: right, wrong and unknown traces, and `pass_rate` = right / (right + wrong), None without any.

    Args:
      unusable: outputs by prompt key that hold no trace; they count as wrong.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for trace in traces:
        counts[trace.prompt_key][_name(trace.correct)] += 1
    for key, number in (unusable or {}).items():
        counts[key]["wrong"] += number
    rates = {}
    for key, count in counts.items():
        known = count["right"] + count["wrong"]
        row = {name: count[name] for name in ("right", "wrong", "unknown")}
        rates[key] = {**row, "pass_rate": count["right"] / known if known else None}
    return rates


def reasons_against(
    traces: Sequence[Trace], rates: Mapping[str, Mapping[str, Any]], config: VerifyConfig
) -> list[str | None]:
    """Why each trace goes, its first reason; None where it stays."""
    tests = [Overlap(read_prompts(source)[0], config.ngram) for source in config.evaluation]
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None

    def reason(trace: Trace) -> str | None:
        chars = len(trace.cot or "") + len(trace.answer or "")
        if any(test.has(trace) for test in tests):
            return "overlap with an evaluation problem"
        if chars < config.min_chars:
            return "too short"
        if config.max_chars is not None and chars > config.max_chars:
            return "too long in characters"
        if tokenizer is not None and _longest(trace, tokenizer, config) > (config.max_tokens or 0):
            return "too long in tokens"
        if config.keep != "all" and (trace.correct is False or (trace.correct is None and config.keep == "right")):
            return "wrong answer" if trace.correct is False else "unknown answer"
        rate = rates[trace.prompt_key]["pass_rate"]
        if rate is None:
            return None if (config.min_pass_rate, config.max_pass_rate) == (0.0, 1.0) else "pass rate unknown"
        return None if config.min_pass_rate <= rate <= config.max_pass_rate else "pass rate out of range"

    return [reason(trace) for trace in traces]


def _unusable(source: Path) -> Counter[str]:
    """Outputs by prompt key that `traces generate` left out beside these traces."""
    file = (source if source.is_dir() else source.parent) / SKIPPED_FILE
    if not file.is_file():
        return Counter()
    try:
        return Counter(str(record["prompt"]) for record in json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged ({error!r}); generate the traces again.") from error


def _longest(trace: Trace, tokenizer: Any, config: VerifyConfig) -> int:
    """Tokens of the longest sequence of a trace."""
    return max(map(len, samples_of(trace, tokenizer, config.render)))


def _with_rate(trace: Trace, rates: Mapping[str, Mapping[str, Any]]) -> Trace:
    return replace(trace, metadata={**trace.metadata, "pass_rate": rates[trace.prompt_key]["pass_rate"]})


def _name(correct: bool | None) -> str:
    return {True: Verdict.RIGHT, False: Verdict.WRONG, None: Verdict.UNKNOWN}[correct].value
