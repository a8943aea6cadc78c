"""What a trace weighs in the loss, by a column of its record: the rate at which its problem is solved, or a weight.

    value       w = v
    one_minus   w = 1 - p          hard problems most
    variance    w = 4 p (1 - p)    1 at p = 1/2, 0 where all or no attempts are right

The variance of a binary reward is p (1 - p): GRPO's gradient (arXiv 2402.03300) grows with it, and DAPO (arXiv
2503.14476) leaves out the prompts where it is 0. Here it weighs given traces, and 4 makes its largest value 1.
"""

from __future__ import annotations

import math
from typing import Literal

from limbeck.config import checked
from limbeck.errors import ConfigError, TraceFormatError
from limbeck.traces.trace import Trace

Formula = Literal["value", "one_minus", "variance"]


@checked
class SampleWeightConfig:
    """Weigh every trace by a number that its record holds."""

    column: str = "pass_rate"
    """Column of the record; every trace must have it."""
    formula: Formula = "variance"
    """value: the number itself, >= 0 | one_minus: 1 - p | variance: 4 p (1 - p), of a rate p in 0 to 1."""

    def __post_init__(self) -> None:
        if not self.column:
            raise ConfigError("sample_weight.column is empty; name the column of the record that holds the number")


def sample_weight(trace: Trace, config: SampleWeightConfig) -> float:
    """The weight of a trace, >= 0.

    Raises: TraceFormatError, naming its place, where the column is missing or out of range.

    >>> sample_weight(Trace(messages=(), cot=None, answer="1", metadata={"pass_rate": 0.5}), SampleWeightConfig())
    1.0
    """
    found = trace.metadata.get(config.column)
    most = math.inf if config.formula == "value" else 1.0
    number = float(found) if isinstance(found, int | float) else math.nan
    if not 0 <= number <= most or number == math.inf:
        said = "missing" if found is None else f"found {str(found)[:40]!r}"
        accepted = "a number of at least 0" if most == math.inf else "a rate in 0 to 1"
        raise TraceFormatError(
            f"{trace.source}: {config.column}: {said}; sample_weight takes {accepted}. Mend it, or name another column."
        )
    return {"value": number, "one_minus": 1 - number, "variance": 4 * number * (1 - number)}[config.formula]
