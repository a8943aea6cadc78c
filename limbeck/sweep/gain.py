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
    """Gain kept with an interval."""

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
    "learning": 0.05,
    "derivations": 0.1,
    "forgetting": 0.2,
    "own_endings": 0.3,
    "censoring": 0.6,
}
"""Set by hand on the six regimes of the fit half that were trained by 2026-11-30, one seed each: too few for a fit.
`python benchmarks/cut_advisor.py` trains what is missing and tells the weights that the fit half then gives."""
HALF_WIDTH = 0.45
"""Half of the interval, within which 11 of 12 regimes were; the twelfth was off by 1.25."""
PROVISIONAL = (
    "The prediction is provisional: its rule was set on 6 tiny regimes and missed badly in 2 of the 6 that tested it. "
    "Train one short pair of runs, whole and cut, before you rely on it."
)
ENOUGH = 0.8
"""Predicted gain kept from which on a cut is recommended."""


def predict(facts: CutFacts, start: Start, weights: Mapping[str, float] = WEIGHTS) -> Predicted:
    """Gain kept by a cut, clipped to the range that is measured."""
    terms = terms_of(facts, start)
    value = 1 - sum(weight * terms[name] for name, weight in weights.items())
    return Predicted(*(float(np.clip(value + shift, LOWEST, HIGHEST)) for shift in (0.0, -HALF_WIDTH, HALF_WIDTH)))
