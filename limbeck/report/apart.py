"""Whether two scored models differ: by the paired difference over problems, or by the difference of their intervals.

Two intervals that overlap prove nothing. Where the scores of single problems are known, and are of the same problems,
the difference is paired (`paired_difference`). Where only value and interval of each are known, the two are taken as
independent: the half widths of their intervals are joined as sqrt(h_a^2 + h_b^2) (Newcombe 1998, method 10), which for
the same problems is too wide rather than too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from limbeck.evaluate.metrics import paired_difference
from limbeck.report.rows import Estimate


class Difference(NamedTuple):
    """One score minus another, with its 95 % interval."""

    value: float
    low: float
    high: float
    how: str
    """paired or unpaired."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.how} difference {self.value:+.2f}, {self.low:+.2f} to {self.high:+.2f}"


def difference(
    score: Estimate, other: Estimate, by_problem: Mapping[str, float], other_by_problem: Mapping[str, float]
) -> Difference | None:
    """The difference of two scores; None where neither single scores nor intervals are known.

    Args:
      by_problem, other_by_problem: scores of single problems by their keys; empty where they are not known.
    """
    if by_problem and by_problem.keys() == other_by_problem.keys():
        found = paired_difference(list(by_problem.values()), [other_by_problem[key] for key in by_problem])
        return Difference(found.value, found.low, found.high, "paired")
    if score.low is None or score.high is None or other.low is None or other.high is None:
        return None
    value = score.value - other.value
    below = math.hypot(score.value - score.low, other.high - other.value)
    above = math.hypot(score.high - score.value, other.value - other.low)
    return Difference(value, value - below, value + above, "unpaired")
