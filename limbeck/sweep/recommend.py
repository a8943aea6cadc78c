"""From what was seen to a recommendation: every cut with its predicted gain, the one to take, and why. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from limbeck.sweep.cut_facts import CutFacts, facts_of, spread_of
from limbeck.sweep.gain import ENOUGH, PROVISIONAL, Predicted, Start, predict
from limbeck.sweep.seen import Seen
from limbeck.traces.fit import fit
from limbeck.traces.sample import PROMPT
from limbeck.traces.truncate import TruncationConfig, truncate

Policy = Literal["common_length", "lead"]
BINS = 40
"""Parts of the response in the profile."""
STOPS = 0.5
"""A student that stops by itself in fewer of its texts is given the ending of the traces."""
LITTLE = 0.02
"""Nats a token; where teacher and student differ by less, there is hardly a gain to keep."""


class Considered(NamedTuple):
    """One cut, what it keeps and what that is predicted to be worth."""

    policy: Policy
    fraction: float
    budget_tokens: int | None
    """The common length in tokens."""
    facts: CutFacts
    flops: float
    """Of training, over those of whole traces."""
    gain_kept: Predicted

    @property
    def name(self) -> str:
        """In a sentence."""
        how = f"a common length of {self.budget_tokens} tokens" if self.budget_tokens else "a share of each trace"
        return f"{how} ({self.fraction:g} of all tokens, {self.flops:.2f} of the FLOPs)"

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        value, low, high = self.gain_kept
        own = {"policy": self.policy, "lead_fraction": self.fraction, "budget_tokens": self.budget_tokens}
        predicted = {"gain_kept": value, "gain_kept_low": low, "gain_kept_high": high}
        return {**own, "flops": self.flops, **predicted}


def advise(seen: Seen, fractions: Sequence[float], unit: Any) -> dict[str, Any]:
    """The advice, ready for JSON: recommendation, sentence, reasons, warnings, not_seen, and what they rest on."""
    start = start_of(seen)
    cuts = [consider(seen, start, policy, share, unit) for policy in ("common_length", "lead") for share in fractions]
    chosen = choose(cuts)
    best = chosen or max(cuts, key=lambda cut: cut.gain_kept.value)
    lengths = list(map(len, seen.samples))
    places = [_place(seen, number) for number, end in enumerate(seen.derivations) if end is not None]
    keeps_ending = chosen is not None and seen.free.stopped < STOPS
    return {
        "recommendation": {"cut": chosen is not None, **best.as_dict(), "keep_ending": keeps_ending},
        "sentence": _sentence(chosen, best),
        "reasons": [*_reasons(seen, best, lengths, places)],
        "warnings": [*_warnings(seen, start, best)],
        "not_seen": [*_not_seen(seen)],
        "cuts": [cut.as_dict() | {"kept": cut.facts._asdict()} for cut in cuts],
        "profile": seen.look.binned(BINS),
        "derivations": {"places": places, "by": seen.derived_by},
        "lengths": spread_of(lengths),
        "borders_a_trace": float(seen.look.borders.sum() / len(seen.samples)),
        "free": seen.free._asdict(),
        "travel": seen.travel,
        "steps": seen.steps,
        "cost": {"seconds": seen.seconds, "flops": seen.flops, "of_an_epoch": seen.flops / seen.epoch_flops},
    }


def start_of(seen: Seen) -> Start:
    """What the rule reads beside the cut; what is not known counts as harmless, and is told."""
    return Start(seen.travel or 0.0, seen.free.copied, seen.free.right or 0.0)


def consider(seen: Seen, start: Start, policy: Policy, fraction: float, unit: Any) -> Considered:
    """One cut of the traces that were looked at."""
    cut = fit(TruncationConfig(policy=policy, lead_fraction=fraction, unit=unit), seen.samples)
    facts = facts_of(seen.samples, seen.look, seen.derivations, cut)
    whole = sum(training_flops(seen, number, TruncationConfig()) for number in range(len(seen.samples)))
    flops = sum(training_flops(seen, number, cut) for number in range(len(seen.samples))) / whole
    return Considered(policy, fraction, cut.budget_tokens, facts, flops, predict(facts, start))


def training_flops(seen: Seen, number: int, cut: TruncationConfig) -> int:
    """Of one training pass over what a cut leaves of a trace."""
    sample = seen.samples[number]
    kept = truncate(sample, cut).kept
    return seen.pair.training_flops(len(kept), int(np.sum(sample.segment_ids[kept] != PROMPT)))


def choose(cuts: Sequence[Considered]) -> Considered | None:
    """The smallest cut that is predicted to keep enough, the better of two of one size; None: none does."""
    good = [cut for cut in cuts if cut.gain_kept.value >= ENOUGH]
    return min(good, key=lambda cut: (cut.fraction, -cut.gain_kept.value), default=None)


def _place(seen: Seen, number: int) -> float:
    """Where the first derivation of a trace ends, as a share of the response."""
    sample, end = seen.samples[number], seen.derivations[number]
    assert end is not None
    prompt = int(np.sum(sample.segment_ids == PROMPT))
    return (end - prompt) / (len(sample) - prompt)


def _sentence(chosen: Considered | None, best: Considered) -> str:
    value, low, high = best.gain_kept
    kept = f"{value:.2f} of the gain of whole traces ({low:.2f} to {high:.2f})"
    if chosen is None:
        return f"Do not cut: the best cut, {best.name}, is predicted to keep {kept}."
    return f"Cut at {best.name}: predicted to keep {kept}."


def _reasons(seen: Seen, best: Considered, lengths: Sequence[int], places: Sequence[float]) -> list[str]:
    facts, free = best.facts, seen.free
    lines = [
        f"It keeps {facts.divergence:.2f} of what teacher and student differ in, and {facts.ends:.2f} of the ends."
    ]
    if places:
        lines.append(
            f"First derivations end at {np.median(places):.2f} of the response in the median; "
            f"{facts.derivations:.2f} of them are in the cut."
        )
    right = "" if free.right is None else f", and is right in {free.right:.2f}"
    lines.append(
        f"By itself the student stops in {free.stopped:.2f} of {free.texts} texts, closes its thought in "
        f"{free.closed:.2f}, answers what it derived in {free.copied:.2f}{right}."
    )
    spread = spread_of(lengths)
    lines.append(
        f"Lengths differ by a factor of {spread['ratio']:.1f} (5th to 95th percentile); the teacher may end at "
        f"{seen.look.borders.sum() / len(seen.samples):.1f} places a trace."
    )
    if seen.travel is not None:
        lines.append(f"In {seen.steps} steps a weight can move by {seen.travel:.2f} of the weights' size.")
    return lines


def _warnings(seen: Seen, start: Start, best: Considered) -> list[str]:
    found = [PROVISIONAL]
    slower = predict(best.facts, start._replace(travel=start.travel / 4))
    if slower.value >= ENOUGH > best.gain_kept.value:
        found.append(
            f"The learning rate is high for a cut: what is cut away is forgotten. At a quarter of it this cut is "
            f"predicted to keep {slower.value:.2f}."
        )
    apart = float(seen.look.divergence.mean())
    if apart < LITTLE:
        found.append(f"Teacher and student differ by {apart:.3f} nats a token; there may be no gain to keep.")
    if seen.free.stopped < STOPS:
        found.append(
            f"The student stops by itself in {seen.free.stopped:.2f} of its texts only, which cut traces do not teach."
        )
    return found


def _not_seen(seen: Seen) -> list[str]:
    found = []
    if seen.free.right is None:
        found.append("Not looked at: how often the student is right, since no trace has a known answer.")
    if seen.derived_by == "nothing":
        found.append("Not looked at: where first derivations end, since no trace has an answer that could be found.")
    if seen.travel is None:
        found.append(
            "Not looked at: the learning rate; only under Adam, without adapters, does it bound what weights move."
        )
    return found
