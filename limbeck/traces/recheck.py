"""The embedded task family `builtin:recheck`: a short derivation, then re-checks of varying number, length and kind.

A problem is one of `builtin:chain` (a start digit and labelled steps modulo 10, so the prompt shows how many there
are). The trace derives the answer at once, states it, and then goes on to check it, as reasoning models do; each
re-check ends by stating the answer again:

    a 7+4=1
    b 1*3=3
    So 3                    the first sufficient prefix ends here
    Check b 1*3=3 ok        one step, looked at again
    So 3
    Check 3                 the steps undone, from the answer backwards
    b 3/3=1
    a 1-4=7 ok
    So 3
    Check start             the steps done again
    a 7+4=1
    b 1*3=3
    So 3

How much is checked is drawn for each trace apart and cannot be told from the prompt: a trace whose derivation takes n
lines goes on for about n r / (1 - r) X lines, where r is the redundancy and X has mean 1 and a Gamma distribution.

Source: the statistics follow published ones of real traces, of whose steps 61 to 93 % come after the first sufficient
prefix (arXiv 2605.23926) and whose lengths spread by a factor of ten. Differs: every line is right, so no re-check
ever changes the answer.
"""

from __future__ import annotations

import random

from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.traces.synthetic import (
    INVERSE,
    LABELS,
    OPERATORS,
    Operation,
    apply_step,
    check_problems,
    draw_problem,
    problem_text,
)
from limbeck.traces.trace import Trace

SOURCE = "builtin:recheck"
LONGEST_LINES = 100
"""Most lines of a thought: about 800 tokens, for which the built-in models have positions."""


@checked
class RecheckConfig:
    """How long the derivations of builtin:recheck are, and how much is checked behind them."""

    min_steps: int = 4
    """Fewest steps of a problem."""
    max_steps: int = 6
    """Most steps of a problem."""
    operators: str = OPERATORS
    """Operators in the problems: one or more of + - *."""
    redundancy: float = 0.8
    """Share r of a trace's lines behind its first derivation, 0 <= r < 1, for a trace of mean length."""
    spread: float = 0.8
    """Standard deviation of the number of lines behind the derivation, over its mean; 0 makes lengths alike."""

    def __post_init__(self) -> None:
        if not (0 <= self.redundancy < 1 and 0 <= self.spread <= 2):
            raise ConfigError(
                f"builtin:recheck: redundancy {self.redundancy}, spread {self.spread}; expected 0 <= redundancy < 1 "
                "and 0 <= spread <= 2"
            )
        longest = (self.max_steps + 1) / (1 - self.redundancy)
        if longest > LONGEST_LINES / 2:
            raise ConfigError(
                f"builtin:recheck: {self.max_steps} steps at redundancy {self.redundancy} take {longest:.0f} lines on "
                f"average; expected at most {LONGEST_LINES // 2}; lower max_steps or redundancy"
            )


def generate_rechecked(num_traces: int, seed: int, config: RecheckConfig) -> list[Trace]:
    """`num_traces` distinct problems with their worked and re-checked solutions, seeded.

    Raises: ConfigError when the step range is empty, beyond the labels, or too small for so many distinct problems.
    """
    check_problems(SOURCE, num_traces, config.min_steps, config.max_steps, config.operators)
    rng = random.Random(seed)
    traces: dict[str, Trace] = {}
    while len(traces) < num_traces:
        start, steps = draw_problem(rng, rng.randint(config.min_steps, config.max_steps), config.operators)
        trace = make_trace(start, steps, config, rng, source=f"{SOURCE} seed {seed} number {len(traces)}")
        traces.setdefault(trace.messages[0]["content"], trace)
    return list(traces.values())


def make_trace(
    start: int, steps: list[Operation], config: RecheckConfig, rng: random.Random, source: str = ""
) -> Trace:
    """The problem with a derivation and re-checks drawn from `rng`; `metadata` tells its lines before and behind."""
    values = [start]
    for step in steps:
        values.append(apply_step(values[-1], step))
    answer = str(values[-1])
    derivation = [*_forwards(values, steps), f"So {answer}"]
    checks = _checks(values, steps, round_at_random(len(derivation) * _excess(config, rng), rng), rng)
    return Trace(
        messages=({"role": "user", "content": problem_text(start, steps)},),
        cot="\n".join([*derivation, *checks]),
        answer=answer,
        source=source,
        reference=answer,
        correct=True,
        metadata={"num_steps": len(steps), "derivation_lines": len(derivation), "check_lines": len(checks)},
    )


def round_at_random(value: float, rng: random.Random) -> int:
    """One of the two whole numbers beside `value`, so that the mean is `value`."""
    return int(value + rng.random())


def _excess(config: RecheckConfig, rng: random.Random) -> float:
    """Lines behind the derivation, over the lines of the derivation."""
    mean = config.redundancy / (1 - config.redundancy)
    if config.spread == 0:
        return mean
    shape = 1 / config.spread**2
    return mean * rng.gammavariate(shape, 1 / shape)


def _checks(values: list[int], steps: list[Operation], lines: int, rng: random.Random) -> list[str]:
    """Re-checks of `lines` lines together, give or take one: of any kind while all of it fits, else a single step."""
    lines = min(lines, LONGEST_LINES - len(steps) - 2)
    made: list[str] = []
    # The shortest re-check has two lines: where one is wanted, it is made half of the time.
    while lines - len(made) > rng.randint(0, 1):
        kinds = (_again, _backwards, _one_step) if lines - len(made) >= len(steps) + 2 else (_one_step,)
        made += [*rng.choice(kinds)(values, steps, rng), f"So {values[-1]}"]
    return made


def _again(values: list[int], steps: list[Operation], rng: random.Random) -> list[str]:
    return ["Check start", *_forwards(values, steps)]


def _backwards(values: list[int], steps: list[Operation], rng: random.Random) -> list[str]:
    undone = [
        f"{LABELS[i]} {values[i + 1]}{INVERSE[steps[i][0]]}{steps[i][1]}={values[i]}"
        for i in reversed(range(len(steps)))
    ]
    return [f"Check {values[-1]}", *undone[:-1], f"{undone[-1]} ok"]


def _one_step(values: list[int], steps: list[Operation], rng: random.Random) -> list[str]:
    return [f"Check {_forwards(values, steps)[rng.randrange(len(steps))]} ok"]


def _forwards(values: list[int], steps: list[Operation]) -> list[str]:
    return [f"{LABELS[i]} {values[i]}{op}{operand}={values[i + 1]}" for i, (op, operand) in enumerate(steps)]
