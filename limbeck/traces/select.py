"""Which traces are used, and which of them are held out: decided on whole traces, before any truncation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.traces.trace import Trace


@checked
class SelectConfig:
    """Which traces are used; length in tokens is limited later, where there is a tokenizer."""

    deduplicate: bool = True
    """Use one trace a prompt: the first that passes the other filters."""
    require_correct: bool = False
    """Use only traces whose answer was verified as right; unknown ones go too."""
    min_cot_chars: int = 0
    """Shortest thought in characters; above 0, traces without a thought are left out."""
    max_cot_chars: int | None = None
    """Longest thought in characters; null sets no limit."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Use only traces whose record has these values in these columns, such as domain: math."""

    def __post_init__(self) -> None:
        if self.min_cot_chars < 0:
            raise ConfigError(f"min_cot_chars: {self.min_cot_chars}; expected 0 or more")
        if self.max_cot_chars is not None and self.max_cot_chars < max(1, self.min_cot_chars):
            raise ConfigError(f"max_cot_chars: {self.max_cot_chars}; expected 1 or more, and min_cot_chars or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectCounts:
    """How many traces stayed, and why the others went."""

    kept: int
    """Traces left."""
    dropped: Mapping[str, int]
    """Reason: number of traces left out for it, only reasons that occurred."""

    def lines(self) -> list[str]:
        """What a user should know of it, one line each."""
        if not self.dropped:
            return []
        causes = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        hint = "; select.deduplicate false uses every trace of a prompt" if DUPLICATE in self.dropped else ""
        total = sum(self.dropped.values())
        return [f"{total} of {self.kept + total} traces are left out: {causes}{hint}"]


DUPLICATE = "duplicate prompt"
VALIDATION_SHARE, MOST_VALIDATION = 10, 64
"""By default one trace in ten is held out, and no more than so many."""


def select_traces(traces: Sequence[Trace], config: SelectConfig) -> tuple[list[Trace], SelectCounts]:
    """Filter, then deduplicate, so that a prompt is lost only when none of its traces passes.

    Raises: ConfigError when nothing is left.
    """
    selected, counts = filter_traces(traces, config)
    dropped = dict(counts.dropped)
    if config.deduplicate:
        selected, counts = deduplicate(selected)
        dropped |= counts.dropped
    if not selected:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "there were none"
        raise ConfigError(f"selection: no trace is left of {len(traces)} ({why}); loosen the filters.")
    return selected, SelectCounts(kept=len(selected), dropped=dropped)


def filter_traces(traces: Sequence[Trace], config: SelectConfig) -> tuple[list[Trace], SelectCounts]:
    """The traces that pass, in order; each of the others counts under its first reason."""
    reasons = [_reason_against(trace, config) for trace in traces]
    kept = [trace for trace, reason in zip(traces, reasons, strict=True) if reason is None]
    dropped = Counter(reason for reason in reasons if reason is not None)
    return kept, SelectCounts(kept=len(kept), dropped=dict(dropped))


def deduplicate(traces: Sequence[Trace]) -> tuple[list[Trace], SelectCounts]:
    """The first trace of each prompt, in order."""
    first: dict[str, Trace] = {}
    for trace in traces:
        first.setdefault(trace.prompt_key, trace)
    num_dropped = len(traces) - len(first)
    dropped = {DUPLICATE: num_dropped} if num_dropped else {}
    return list(first.values()), SelectCounts(kept=len(first), dropped=dropped)


def validation_size(num_traces: int, asked: int | None) -> int:
    """How many traces are held out: as many as asked for, else a tenth, at most MOST_VALIDATION."""
    return min(MOST_VALIDATION, num_traces // VALIDATION_SHARE) if asked is None else asked


def _share_of_prompts(traces: Sequence[Trace], seed: int, fraction: float) -> set[str]:
    if not 0 <= fraction < 1:
        raise ConfigError(f"validation_fraction: {fraction}; expected 0 <= x < 1.")
    return {trace.prompt_key for trace in traces if _split_hash(trace.prompt_key, seed) < fraction * 2**64}


def split_traces(
    traces: Sequence[Trace],
    seed: int,
    validation_fraction: float | None = None,
    num_validation: int | None = None,
) -> tuple[list[Trace], list[Trace]]:
    """Training and validation traces, in order; traces of one prompt are always on the same side.

    A seeded hash of the prompt decides. With a fraction, a trace's side depends on nothing but its prompt and
    the seed. With a number, the prompts of lowest hash are held out until that many traces are, in any order.

    Args:
        traces: whole traces, not yet cut.
        seed: another seed holds out other prompts.
        validation_fraction: expected share of prompts held out, 0 <= x < 1; or give `num_validation`.
        num_validation: traces held out, and the rest of the last prompt's where it has several.

    Raises: ConfigError when neither or both are given, one is out of range, or nothing is left for training.
    """
    if (validation_fraction is None) == (num_validation is None):
        raise ConfigError("validation: set either validation_fraction or num_validation.")
    if validation_fraction is not None:
        held_out = _share_of_prompts(traces, seed, validation_fraction)
    else:
        assert num_validation is not None
        held_out = _lowest_prompts(traces, seed, num_validation)
    train = [trace for trace in traces if trace.prompt_key not in held_out]
    validation = [trace for trace in traces if trace.prompt_key in held_out]
    if validation and not train:
        raise ConfigError(
            f"validation: all {len(traces)} traces would be held out; lower num_validation (0 holds out none)."
        )
    return train, validation


def _reason_against(trace: Trace, config: SelectConfig) -> str | None:
    if config.require_correct and trace.correct is not True:
        return "not verified" if trace.correct is None else "wrong answer"
    for column, wanted in config.where.items():
        if str(trace.metadata.get(column)) != wanted:
            return f"{column} is not {wanted}"
    length = 0 if trace.cot is None else len(trace.cot)
    if length < config.min_cot_chars:
        return "thought too short"
    if config.max_cot_chars is not None and length > config.max_cot_chars:
        return "thought too long"
    return None


def _lowest_prompts(traces: Sequence[Trace], seed: int, num_validation: int) -> set[str]:
    if num_validation < 0:
        raise ConfigError(f"num_validation: {num_validation}; expected 0 or more.")
    traces_of = Counter(trace.prompt_key for trace in traces)
    held_out: set[str] = set()
    count = 0
    for key in sorted(traces_of, key=lambda key: _split_hash(key, seed)):
        if count >= num_validation:
            break
        held_out.add(key)
        count += traces_of[key]
    return held_out


def _split_hash(prompt_key: str, seed: int) -> int:
    """An integer in [0, 2**64), uniform over prompts."""
    return int.from_bytes(hashlib.sha256(f"split {seed} {prompt_key}".encode()).digest()[:8])
