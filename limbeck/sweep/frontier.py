"""The Pareto frontier: which runs no other run beats in quality at their cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence


def on_frontier(costs: Sequence[float], qualities: Sequence[float]) -> list[bool]:
    """Mark the runs that no other run dominates.

    Run j dominates run i when cost_j <= cost_i and quality_j >= quality_i, and one of the two is strict. Runs of equal
    cost and quality do not dominate each other. A run whose cost or quality is NaN (not measured) is never on the
    frontier and dominates nothing.

    Args:
      costs: what each run spent, in any one unit; less is better.
      qualities: what each run scored; more is better.
    Returns: one flag a run, in the order given.
    Raises: ValueError when the lengths differ.
    """
    known = [(c, -q, i) for i, (c, q) in enumerate(zip(costs, qualities, strict=True)) if not math.isnan(c + q)]
    flags = [False] * len(costs)
    best = -math.inf
    best_cost = math.nan
    # By rising cost, and by falling quality within a cost: a run is on the frontier when it beats all cheaper ones.
    for cost, negated, index in sorted(known):
        quality = -negated
        if quality > best or (quality == best and cost == best_cost):
            flags[index] = True
            best, best_cost = quality, cost
    return flags
