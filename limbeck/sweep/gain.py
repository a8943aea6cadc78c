"""The share of the gain of whole traces that a cut keeps, predicted from one look, by a rule with few terms.

    gain kept = 1 - sum_i w_i x_i,   w_i >= 0,   x_i >= 0 and 0 for whole traces

so that not cutting keeps all of it, and no weight can make a worse cut look better. A term is what is lost, times what
makes that matter:
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from limbeck.sweep.cut_facts import CutFacts

LOWEST, HIGHEST = -0.5, 1.1
"""Gain kept is clipped to this range, in the measurements too: below it a student is spoilt, whatever the number."""


class Start(NamedTuple):
    """What is the same for all cuts of a run."""

    travel: float
    """Most that the optimizer can move a weight in the run, over the root mean square of the weights."""
    ends_well: float
    """Share of the student's own texts that stop and answer what they derived."""
    right: float
    """Share of them that are right; 0 where it is not known."""


class Predicted(NamedTuple):
    """Gain kept with the interval that 9 of 10 measurements were in."""

    value: float
    low: float
    high: float


def terms_of(facts: CutFacts, start: Start) -> dict[str, float]:
    """The terms x_i by name."""
    lost_ends = 1 - facts.ends
    weight = 1 / (1 - min(start.right, MOST_RIGHT))
    return {
        "learning": 1 - facts.divergence,
        "derivations": 0.0 if facts.derivations is None else 1 - facts.derivations,
        "forgetting": start.travel * lost_ends * weight,
        "own_endings": lost_ends * (1 - start.ends_well),
        "censoring": facts.censored * weight,
    }


MOST_RIGHT = 0.8
"""A student that is right more often counts as this one: what is left to gain would be noise."""
WEIGHTS: Mapping[str, float] = {
    "learning": 0.5,
    "derivations": 0.5,
    "forgetting": 0.1,
    "own_endings": 0.5,
    "censoring": 0.3,
}
HALF_WIDTH = 0.3
ENOUGH = 0.85
"""Predicted gain kept from which on a cut is recommended."""


def predict(facts: CutFacts, start: Start, weights: Mapping[str, float] = WEIGHTS) -> Predicted:
    """Gain kept by a cut, clipped to the range that is measured."""
    terms = terms_of(facts, start)
    value = 1 - sum(weight * terms[name] for name, weight in weights.items())
    return Predicted(*(float(np.clip(value + shift, LOWEST, HIGHEST)) for shift in (0.0, -HALF_WIDTH, HALF_WIDTH)))
