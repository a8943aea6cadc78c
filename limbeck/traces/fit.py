"""What a cut takes from all traces together: the length or the scale at which they keep a share of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from limbeck.errors import ConfigError
from limbeck.traces.horizon import common_length, horizon_scale
from limbeck.traces.sample import Sample
from limbeck.traces.truncate import ACROSS_TRACES, TruncationConfig, exact_fraction, is_whole, unit_bounds


def fit(policy: TruncationConfig, samples: Sequence[Sample]) -> TruncationConfig:
    """`policy` with what it takes from all traces together: a common length or the scale of a horizon, in tokens.

    Args:
      policy: any; one that looks at each trace alone is returned as it is.
      samples: all whole samples that it is to cut.
    Returns: common_length as policy budget, random_horizon with its `budget_tokens`.
    Raises: ConfigError where the traces that stay whole have more than the share of the tokens.
    """
    whole = np.array([is_whole(sample, policy) for sample in samples])
    return fit_lengths(policy, unit_lengths(samples, policy), whole)


def fit_lengths(policy: TruncationConfig, lengths: np.ndarray, whole: np.ndarray) -> TruncationConfig:
    """`fit` from the tokens that the unit has in each trace, int64 [n], and which traces stay whole, bool [n]."""
    fraction = exact_fraction(policy.lead_fraction)
    if policy.policy not in ACROSS_TRACES or policy.budget_tokens is not None or fraction == 1 or not lengths.any():
        return policy
    budget = fraction.numerator * int(lengths.sum()) // fraction.denominator - int(lengths[whole].sum())
    if whole.any() and budget < np.count_nonzero(lengths[~whole]):
        raise ConfigError(
            f"the {int(whole.sum())} traces that whole_fraction keeps have {int(lengths[whole].sum())} of "
            f"{int(lengths.sum())} tokens, so lead_fraction {policy.lead_fraction} leaves none for the others"
        )
    if policy.policy == "random_horizon":
        return replace(policy, lead_fraction=1.0, budget_tokens=horizon_scale(lengths, budget))
    tokens = common_length(lengths[~whole], budget)
    return replace(policy, policy="budget", lead_fraction=1.0, budget_tokens=tokens)


def unit_lengths(samples: Sequence[Sample], policy: TruncationConfig) -> np.ndarray:
    """Tokens of the unit in each sample: int64 [n].

    Raises: ConfigError where one length is looked for, and samples have several turns of their own lengths.
    """
    if policy.policy in ACROSS_TRACES and policy.unit != "sequence" and any(sample.turns for sample in samples):
        raise ConfigError(
            f"policy {policy.policy} looks for one length of a {policy.unit}, and these traces have several turns; set "
            "truncation.unit sequence"
        )
    bounds = [unit_bounds(sample, policy.unit) for sample in samples]
    return np.array([stop - start for start, stop in bounds], dtype=np.int64)
