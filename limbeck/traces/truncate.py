"""Truncation: which tokens of a sample stay in context, and which of those may carry loss. Pure functions.

A policy picks a span of a unit (the whole sequence, the response, or the thought):

    lead              the first floor(x * L) tokens                    (the paper's lead-span proportion)
    middle, tail      the same number from the middle or the end
    random_span       the same number from a seeded random start
    budget            the first `budget_tokens` tokens
    first_derivation  up to the first derivation of the verified answer; the whole unit when none is found
    probed            up to the earliest prefix from which a teacher already answers right (`limbeck traces probe`); the
                      whole unit when there is none

with floor in exact rational arithmetic and at least 1 token. What lies before the unit stays; what lies after it goes,
unless `keep_ending` re-attaches the end marker, the answer and the end of turn. `mask_only` keeps every token in
context and only takes the loss from those outside the span. A fraction of 1 is the uncut sample under every policy.

Source: arXiv 2512.21002, lead-span proportion. Differs: the fraction is exact (0.7 of 10 is 7), a fraction outside
(0, 1] is an error, and prompt and ending can be protected.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import numpy as np

from limbeck.config import checked
from limbeck.errors import ConfigError, nearest
from limbeck.traces.sample import ANSWER, PROMPT, Sample

Policy = Literal["lead", "middle", "tail", "random_span", "budget", "first_derivation", "probed"]
WITHOUT_FRACTION = ("budget", "first_derivation", "probed")
"""Policies that take no fraction and cut even where it is 1."""
Unit = Literal["sequence", "response", "cot"]


@checked
class TruncationConfig:
    """Which part of every trace is kept."""

    policy: Policy = "lead"
    """lead | middle | tail | random_span take a fraction; budget takes tokens; first_derivation stops at the answer and
    probed where a teacher already knows it."""
    lead_fraction: float | str = 1.0
    """Share of the unit's tokens that is kept, 0 < x <= 1; a number or an exact ratio such as "1/3"."""
    unit: Unit = "sequence"
    """What the fraction is of: the whole sequence (as in the paper), the response, or the cot."""
    budget_tokens: int | None = None
    """Tokens of the unit kept by the budget policy, >= 1."""
    keep_ending: bool = False
    """Re-attach the end marker, the answer and the end-of-turn token behind the cut."""
    mask_only: bool = False
    """Keep every token in context and cut the loss only."""
    seed: int = 0
    """Seed of random_span."""

    def __post_init__(self) -> None:
        for name, value, known in (("policy", self.policy, get_args(Policy)), ("unit", self.unit, get_args(Unit))):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}; {nearest(str(value), known)}")
        exact_fraction(self.lead_fraction)
        if (self.budget_tokens is not None) != (self.policy == "budget"):
            raise ConfigError("budget_tokens goes with policy budget, and policy budget needs it")
        if self.budget_tokens is not None and self.budget_tokens < 1:
            raise ConfigError(f"budget_tokens must be at least 1; found {self.budget_tokens}")
        if self.policy in WITHOUT_FRACTION and exact_fraction(self.lead_fraction) != 1:
            raise ConfigError(f"lead_fraction has no meaning with policy {self.policy}; leave it at 1")


class Cut(NamedTuple):
    """What a policy leaves of a sample of T tokens."""

    kept: np.ndarray
    """int64 [n], increasing: indices of the tokens that stay in context."""
    supervised: np.ndarray
    """bool [n]: which of the kept tokens may carry loss."""


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


def truncate(sample: Sample, policy: TruncationConfig) -> Cut:
    """Apply `policy` to one sample.

    Args:
      sample: T tokens with segments and landmarks.
      policy: the checked policy.
    Returns: kept indices and which of them may carry loss; everything when nothing is cut.
    """
    everything = np.arange(len(sample))
    start, stop = _unit_bounds(sample, policy.unit)
    first, last = _span(sample, policy, start, stop)
    if (first, last) == (start, stop):
        return Cut(everything, np.ones(len(sample), dtype=bool))
    inside = (everything < start) | ((everything >= first) & (everything < last))
    if policy.keep_ending:
        inside |= everything >= sample.ending_start
    if policy.mask_only:
        return Cut(everything, inside)
    kept = everything[inside]
    return Cut(kept, np.ones(len(kept), dtype=bool))


def apply_cut(sample: Sample, cut: Cut) -> Sample:
    """The sample with only the kept tokens; landmarks move along."""
    kept = cut.kept
    ending = int(np.searchsorted(kept, sample.ending_start))

    def moved(end: int | None) -> int | None:
        return int(np.searchsorted(kept, end)) if end is not None and end - 1 in kept else None

    return Sample(
        input_ids=sample.input_ids[kept],
        segment_ids=sample.segment_ids[kept],
        ending_start=ending,
        derivation_end=moved(sample.derivation_end),
        probed_end=moved(sample.probed_end),
        trace_key=sample.trace_key,
        source=sample.source,
    )


def _unit_bounds(sample: Sample, unit: Unit) -> tuple[int, int]:
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
    count = share_of(length, policy.lead_fraction)
    slack = length - count
    offset = {
        "lead": 0,
        "middle": slack // 2,
        "tail": slack,
        "random_span": _random_offset(sample, policy.seed, slack),
    }[policy.policy]
    return start + offset, start + offset + count


def _random_offset(sample: Sample, seed: int, slack: int) -> int:
    """A seeded whole number in [0, slack]; one draw a sample, so that the spans of growing fractions are nested."""
    digest = hashlib.sha256(f"{seed}:{sample.trace_key}:{len(sample)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * (slack + 1) >> 64
