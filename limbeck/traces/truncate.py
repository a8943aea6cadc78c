"""Truncation: which tokens of a sample stay in context, and which of those may carry loss. Pure functions.

A policy picks a span of a unit (the whole sequence, the response, or the thought):

    lead              the first floor(x * L) tokens                    (the paper's lead-span proportion)
    middle, tail      the same number from the middle or the end
    random_span       the same number from a seeded random start
    budget            the first `budget_tokens` tokens
    common_length     the first N tokens of every trace, N such that all traces together keep x of their tokens
    random_horizon    up to a seeded random place, in the mean as much; what stays with chance S weighs 1 / S
    first_derivation  up to the first derivation of the verified answer; the whole unit when none is found
    probed            up to the earliest prefix from which a teacher already answers right (`limbeck traces probe`); the
                      whole unit when there is none

with floor in exact rational arithmetic and at least 1 token. What lies before the unit stays; what lies after it goes,
unless `keep_ending` re-attaches the end marker, the answer and the end of turn. `mask_only` keeps every token in
context and only takes the loss from those outside the span. Of several trained turns each is cut (`unit` response or
cot), with its ending or as a mask, since the next ones stand behind it. A fraction of 1 is the uncut sample under every
policy. `whole_fraction` leaves a seeded share of the traces whole. What follows from all traces together is found once,
by `traces.fit`; `traces.horizon` has the mathematics.

Source: arXiv 2512.21002, lead-span proportion. Differs: the fraction is exact (0.7 of 10 is 7), a fraction outside
(0, 1] is an error, and prompt and ending can be protected. A cut at a common length is not in the paper.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import numpy as np

from limbeck.config import checked, only
from limbeck.errors import ConfigError, nearest
from limbeck.traces.horizon import DRAWS, horizon, horizon_weights
from limbeck.traces.sample import ANSWER, COT, PROMPT, Sample

Policy = Literal[
    "lead",
    "middle",
    "tail",
    "random_span",
    "budget",
    "common_length",
    "random_horizon",
    "first_derivation",
    "probed",
]
WITHOUT_FRACTION = ("budget", "first_derivation", "probed")
"""Policies that take no fraction and cut even where it is 1."""
ACROSS_TRACES = ("common_length", "random_horizon")
"""Policies whose fraction is of the tokens of all traces together; they cut when `fit` has seen these."""
Unit = Literal["sequence", "response", "cot"]


@checked
class TruncationConfig:
    """Which part of every trace is kept."""

    policy: Policy = "lead"
    """lead | middle | tail | random_span take a fraction of each trace; common_length and random_horizon of all traces
    together; budget takes tokens; first_derivation stops at the answer and probed where a teacher already knows it."""
    lead_fraction: float | str = 1.0
    """Share of the unit's tokens that is kept, 0 < x <= 1; a number or an exact ratio such as "1/3"."""
    unit: Unit = "sequence"
    """What the fraction is of: the whole sequence (as in the paper), the response, or the cot."""
    budget_tokens: int | None = None
    """Tokens of the unit kept by the budget policy, or the scale of random_horizon in place of its fraction, >= 1."""
    max_weight: float | None = only("policy", "random_horizon", default=None)
    """Largest weight of a token, >= 1; null leaves them as they are, and the loss unbiased."""
    whole_fraction: float = 0.0
    """Share of the traces, chosen by seed, that stay whole, 0 <= x <= 1. With common_length they count in its share."""
    keep_ending: bool = False
    """Re-attach the end marker, the answer and the end-of-turn token behind the cut."""
    mask_only: bool = False
    """Keep every token in context and cut the loss only."""
    seed: int = 0
    """Seed of random_span, of random_horizon and of the traces that stay whole."""

    def __post_init__(self) -> None:
        for name, value, known in (("policy", self.policy, get_args(Policy)), ("unit", self.unit, get_args(Unit))):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}; {nearest(str(value), known)}")
        self._check_amounts()
        if not 0 <= self.whole_fraction <= 1:
            raise ConfigError(f"whole_fraction must be in [0, 1]; found {self.whole_fraction}")
        if self.max_weight is not None and not self.max_weight >= 1:
            raise ConfigError(f"max_weight must be at least 1; found {self.max_weight}")
        if self.policy == "random_horizon" and (self.whole_fraction or self.keep_ending):
            raise ConfigError(
                "policy random_horizon weighs tokens by how likely they are kept; leave keep_ending and whole_fraction"
            )

    def _check_amounts(self) -> None:
        fraction, has_budget = exact_fraction(self.lead_fraction), self.budget_tokens is not None
        if has_budget > (self.policy in ("budget", "random_horizon")) or has_budget < (self.policy == "budget"):
            raise ConfigError("budget_tokens goes with policy budget, and policy budget needs it")
        if self.budget_tokens is not None and self.budget_tokens < 1:
            raise ConfigError(f"budget_tokens must be at least 1; found {self.budget_tokens}")
        if (self.policy in WITHOUT_FRACTION or has_budget) and fraction != 1:
            raise ConfigError(f"lead_fraction has no meaning with policy {self.policy}; leave it at 1")


class Cut(NamedTuple):
    """What a policy leaves of a sample of T tokens."""

    kept: np.ndarray
    """int64 [n], increasing: indices of the tokens that stay in context."""
    supervised: np.ndarray
    """bool [n]: which of the kept tokens may carry loss."""
    weight: np.ndarray | None = None
    """float32 [n]: what each kept token stands for; None: itself."""

    def loss_weight(self) -> np.ndarray:
        """float32 [n]: weight of each kept token as a target, before that of its segment."""
        return self.supervised.astype(np.float32) * (1 if self.weight is None else self.weight)


def exact_fraction(value: float | str | Fraction) -> Fraction:
    """The decimal or ratio as written, as an exact number in (0, 1].

    Raises: ConfigError outside (0, 1] or when it is no number.
    """
    try:
        if isinstance(value, bool):
            raise TypeError("a truth value is no share")
        fraction = Fraction(value) if isinstance(value, str | Fraction) else Fraction(repr(float(value)))
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"lead_fraction must be a number or a ratio in (0, 1]; found {value!r}") from error
    if not 0 < fraction <= 1:
        raise ConfigError(f"lead_fraction must be in (0, 1]; found {value!r}")
    return fraction


def share_of(length: int, value: float | str | Fraction) -> int:
    """floor(value * length), exactly, and at least 1 (0 of nothing)."""
    fraction = exact_fraction(value)
    return min(length, max(1, fraction.numerator * length // fraction.denominator))


def is_whole(sample: Sample, policy: TruncationConfig) -> bool:
    """Whether the sample is one of those that stay whole; those of a smaller share stay so in a larger one."""
    share = policy.whole_fraction
    return share > 0 and _draw(sample, f"whole {policy.seed}") < share * DRAWS


def truncate(sample: Sample, policy: TruncationConfig) -> Cut:
    """Apply `policy` to one sample.

    Args:
      sample: T tokens with segments and landmarks.
      policy: the checked policy, fitted to all samples where it looks at them together (`traces.fit`).
    Returns: kept indices, which of them may carry loss and what they stand for; everything when nothing is cut.
    """
    everything = np.arange(len(sample))
    if sample.turns and policy.unit != "sequence":
        return _cut_turns(sample, policy)
    start, stop = unit_bounds(sample, policy.unit)
    first, last = (start, stop) if is_whole(sample, policy) else _span(sample, policy, start, stop)
    if policy.policy == "random_horizon" and policy.budget_tokens is not None:
        return _cut_at_horizon(sample, policy, start, stop)
    if (first, last) == (start, stop):
        return Cut(everything, np.ones(len(sample), dtype=bool))
    inside = (everything < start) | ((everything >= first) & (everything < last))
    if policy.keep_ending:
        inside |= everything >= sample.ending_start
    if policy.mask_only:
        return Cut(everything, inside)
    kept = everything[inside]
    return Cut(kept, np.ones(len(kept), dtype=bool))


def _cut_turns(sample: Sample, policy: TruncationConfig) -> Cut:
    """A sample of several turns, the unit cut in every one of them; all between the turns stays."""
    inside = np.ones(len(sample), dtype=bool)
    for turn in () if is_whole(sample, policy) else sample.turns:
        stop = turn.stop
        if policy.unit == "cot":
            stop = turn.start + int(np.sum(sample.segment_ids[turn.start : turn.stop] == COT))
        first, last = _span(sample, policy, turn.start, stop)
        inside[turn.start : turn.stop] = False
        inside[first:last] = True
        if policy.keep_ending:
            inside[turn.ending : turn.stop] = True
    if inside.all() or policy.mask_only:
        return Cut(np.arange(len(sample)), inside)
    if not policy.keep_ending:
        raise ConfigError(
            "traces of several turns are cut inside of every turn, behind which the next ones stand: set "
            "truncation.keep_ending or mask_only, or unit sequence"
        )
    kept = np.flatnonzero(inside)
    return Cut(kept, np.ones(len(kept), dtype=bool))


def _cut_at_horizon(sample: Sample, policy: TruncationConfig, start: int, stop: int) -> Cut:
    assert policy.budget_tokens is not None
    length = stop - start
    kept = min(length, horizon(_draw(sample, str(policy.seed)), policy.budget_tokens))
    weight = np.ones(len(sample), dtype=np.float32)
    weight[start:stop] = horizon_weights(length, policy.budget_tokens, policy.max_weight)
    # What lies behind the unit is there when all of the unit is.
    weight[stop:] = weight[stop - 1] if length else 1.0
    last = len(sample) if kept == length else start + kept
    everything = np.arange(len(sample))
    if policy.mask_only:
        return Cut(everything, everything < last, weight)
    return Cut(everything[:last], np.ones(last, dtype=bool), weight[:last])


def apply_cut(sample: Sample, cut: Cut) -> Sample:
    """The sample with only the kept tokens; landmarks move along."""
    kept = cut.kept

    def place(index: int) -> int:
        return int(np.searchsorted(kept, index))

    def moved(end: int | None) -> int | None:
        return place(end) if end is not None and end - 1 in kept else None

    return replace(
        sample,
        input_ids=sample.input_ids[kept],
        segment_ids=sample.segment_ids[kept],
        ending_start=place(sample.ending_start),
        derivation_end=moved(sample.derivation_end),
        probed_end=moved(sample.probed_end),
        turns=tuple(
            turn._replace(start=place(turn.start), ending=place(turn.ending), stop=place(turn.stop))
            for turn in sample.turns
        ),
    )


def unit_bounds(sample: Sample, unit: Unit) -> tuple[int, int]:
    """Where the unit begins and ends in a sample, in tokens."""
    segments = sample.segment_ids
    if unit == "sequence":
        return 0, len(sample)
    if unit == "response":
        return int(np.sum(segments == PROMPT)), len(sample)
    return int(np.sum(segments == PROMPT)), int(np.sum(segments != ANSWER))


def _span(sample: Sample, policy: TruncationConfig, start: int, stop: int) -> tuple[int, int]:
    length = stop - start
    if policy.policy in ("first_derivation", "probed"):
        end = sample.derivation_end if policy.policy == "first_derivation" else sample.probed_end
        return start, stop if end is None else min(max(end, start), stop)
    if policy.policy == "budget":
        assert policy.budget_tokens is not None
        return start, start + min(length, policy.budget_tokens)
    if policy.policy in ACROSS_TRACES and exact_fraction(policy.lead_fraction) != 1:
        raise ConfigError(f"policy {policy.policy} looks at all traces together; give it those first (`fit`)")
    count = share_of(length, policy.lead_fraction)
    slack = length - count
    offset = {
        "lead": 0,
        "common_length": 0,
        "random_horizon": 0,
        "middle": slack // 2,
        "tail": slack,
        "random_span": _random_offset(sample, policy.seed, slack),
    }[policy.policy]
    return start + offset, start + offset + count


def _random_offset(sample: Sample, seed: int, slack: int) -> int:
    """A seeded whole number in [0, slack]; one draw a sample, so that the spans of growing fractions are nested."""
    return _draw(sample, str(seed)) * (slack + 1) >> 64


def _draw(sample: Sample, seed: str) -> int:
    """A seeded whole number in [0, 2^64) for a sample."""
    digest = hashlib.sha256(f"{seed}:{sample.trace_key}:{len(sample)}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
