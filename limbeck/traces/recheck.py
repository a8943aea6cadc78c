"""The embedded task family `builtin:recheck`: a short derivation, then re-checks of varying number, length and kind.

A problem is one of `builtin:chain` (a start digit and labelled steps modulo 10, so the prompt shows how many there
are), and so is the derivation. The trace then goes on to check what it has, as reasoning models do: it calculates from
the answer by fives there and back, once or several times, or only looks at it again, and states it anew behind each
re-check:

    Given 8a+7b*9
    a 8+7=5
    b 5*9=5
    So 5                    the first sufficient prefix ends here
    Check 5+5=0
    Check 0-5=5 ok
    So 5
    Check 5 ok
    So 5
    Check 5-5=0
    Check 0-5=5 ok
    Check 5+5=0
    Check 0+5=5 ok
    So 5

How much is checked is drawn for each trace apart and cannot be told from the prompt: a trace whose derivation takes n
lines goes on for about n r / (1 - r) X lines, where r is the redundancy and X has mean 1 and a Gamma distribution.
Re-checks copy over a few tokens only, and neither multiply nor look anything up: a student that derives wrong still
answers what it derived, so that its score tells how well it derives.

Source: the statistics follow published ones of real traces, of whose steps 61 to 93 % come after the first sufficient
prefix (arXiv 2605.23926) and whose lengths spread by a factor of ten. Differs: no re-check ever changes the answer.
"""

from __future__ import annotations

import random

from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.traces.synthetic import (
    OPERATORS,
    Operation,
    apply_step,
    check_problems,
    derivation_lines,
    draw_problem,
    problem_text,
)
from limbeck.traces.trace import Trace

SOURCE = "builtin:recheck"
LONGEST_LINES = 100
"""Most lines of a thought: about 800 tokens, for which the built-in models have positions."""
ROUNDS = (0, 1, 2, 3)
"""How often a re-check calculates there and back, of which one is drawn."""


@checked
class RecheckConfig:
    """How long the derivations of builtin:recheck are, and how much is checked behind them."""

    fewest_steps: int = 4
    """Fewest steps of a problem."""
    most_steps: int = 5
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
        longest = (self.most_steps + 2) / (1 - self.redundancy)
        if longest > LONGEST_LINES / 2:
            raise ConfigError(
                f"builtin:recheck: {self.most_steps} steps at redundancy {self.redundancy} take {longest:.0f} lines on "
                f"average; expected at most {LONGEST_LINES // 2}; lower most_steps or redundancy"
            )


def generate_rechecked(num_traces: int, seed: int, config: RecheckConfig) -> list[Trace]:
    """`num_traces` distinct problems with their worked and re-checked solutions, seeded.

    Raises: ConfigError when the step range is empty, beyond the labels, or too small for so many distinct problems.
    """
    check_problems(SOURCE, num_traces, config.fewest_steps, config.most_steps, config.operators)
    rng = random.Random(seed)
    traces: dict[str, Trace] = {}
    while len(traces) < num_traces:
        start, steps = draw_problem(rng, rng.randint(config.fewest_steps, config.most_steps), config.operators)
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
    derivation = [*derivation_lines(values, steps), f"So {values[-1]}"]
    lines = round_at_random(len(derivation) * _excess(config, rng), rng)
    checks = _checks(values[-1], min(lines, LONGEST_LINES - len(derivation) - 1), rng)
    return Trace(
        messages=({"role": "user", "content": problem_text(start, steps)},),
        cot="\n".join([*derivation, *checks]),
        answer=derivation[-1],
        source=source,
        reference=str(values[-1]),
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


def _checks(answer: int, lines: int, rng: random.Random) -> list[str]:
    """Re-checks of `lines` lines together, give or take one: of any kind while all of it fits, else a look."""
    made: list[str] = []
    # The shortest re-check has two lines: where one is wanted, it is made half of the time.
    while lines - len(made) > rng.randint(0, 1):
        fitting = [rounds for rounds in ROUNDS if 2 * rounds < lines - len(made)]
        made += [*_check(answer, rng.choice(fitting or ROUNDS[:1]), rng), f"So {answer}"]
    return made


def _check(answer: int, rounds: int, rng: random.Random) -> list[str]:
    """Calculations from the answer there and back, so many times; none is a look at it."""
    lines = [] if rounds else [f"{answer} ok"]
    for _ in range(rounds):
        there = apply_step(answer, ("+", 5))
        lines += [f"{answer}{rng.choice('+-')}5={there}", f"{there}{rng.choice('+-')}5={answer} ok"]
    return [f"Check {line}" for line in lines]
