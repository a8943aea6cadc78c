"""The embedded task family: chains of modular steps, with traces that restate, derive, then check another way.

A problem is a start digit and n labelled steps modulo 10, for example `7 a+4 b*3 c-8 d+9`. Every step is one lookup
in a table of at most 10 x 9 entries per operator, and the label makes the running position explicit, so a very small
transformer can learn it; the number of steps sets the difficulty. The trace restates the problem, derives the answer
forwards, then undoes the steps backwards from the answer and compares each value with the one derived before:

    Given 7a+4b*3c-8d+9
    a 7+4=1
    ...
    So 4
    Check
    d 4-9=5 c=5 ok
    ...
    a 1-4=7 start=7 ok

The line `So 4`, the first derivation, falls a little after the middle of the sequence.
"""

from __future__ import annotations

import random

from limbeck.errors import ConfigError
from limbeck.traces.trace import Trace

LABELS = "abcdefghijklmnop"
OPERATORS = "+-*"
UNITS = (3, 7, 9)
"""Factors that have an inverse modulo 10, so that every step can be undone."""
DERIVATION_PATTERN = r"So {answer}"
"""`RenderConfig.derivation_pattern` for these traces: every digit occurs earlier, in the problem or a step."""

INVERSE = {"+": "-", "-": "+", "*": "/"}
"""What undoes an operator in a check."""

Operation = tuple[str, int]


def check_problems(source: str, num_traces: int, min_steps: int, max_steps: int, operators: str) -> None:
    """Refuse what a source of this name cannot make.

    Raises: ConfigError.
    """
    if not 1 <= min_steps <= max_steps <= len(LABELS):
        raise ConfigError(
            f"{source}: min_steps {min_steps}, max_steps {max_steps}; expected 1 <= min <= max <= {len(LABELS)}."
        )
    if not operators or set(operators) - set(OPERATORS):
        raise ConfigError(f"{source}: operators {operators!r}; expected one or more of {OPERATORS}")
    choices = sum(len(UNITS) if operator == "*" else 9 for operator in set(operators))
    possible = sum(10 * choices**steps for steps in range(min_steps, max_steps + 1))
    if num_traces > possible // 2:
        raise ConfigError(
            f"{source}: {num_traces} distinct problems asked for, {possible} exist with these steps; ask for at "
            f"most {possible // 2} or allow more steps."
        )


def generate(
    num_traces: int,
    seed: int,
    min_steps: int,
    max_steps: int,
    *,
    operators: str = OPERATORS,
    random_labels: bool = False,
) -> list[Trace]:
    """`num_traces` distinct problems of `min_steps` to `max_steps` steps with their worked solutions, seeded.

    Args:
      operators: which of + - * occur. Multiplication is what makes a problem hard for the built-in base student.
      random_labels: label the steps from a random letter on instead of from a, so that a model has to look labels up
        and cannot count positions.
    Raises: ConfigError when the step range is empty, beyond the labels, or too small for so many distinct problems.
    """
    check_problems("builtin:chain", num_traces, min_steps, max_steps, operators)
    rng = random.Random(seed)
    seen: set[str] = set()
    traces: list[Trace] = []
    while len(traces) < num_traces:
        start, steps = draw_problem(rng, rng.randint(min_steps, max_steps), operators)
        labels = LABELS[rng.randint(0, len(LABELS) - len(steps)) :] if random_labels else LABELS
        text = problem_text(start, steps, labels)
        if text not in seen:
            seen.add(text)
            source = f"builtin:chain seed {seed} number {len(traces)}"
            traces.append(make_trace(start, steps, source=source, labels=labels))
    return traces


def draw_problem(rng: random.Random, num_steps: int, operators: str = OPERATORS) -> tuple[int, list[Operation]]:
    """A start digit and `num_steps` uniformly drawn steps."""
    steps = []
    for _ in range(num_steps):
        operator = rng.choice(operators)
        steps.append((operator, rng.choice(UNITS) if operator == "*" else rng.randint(1, 9)))
    return rng.randint(0, 9), steps


def apply_step(value: int, step: Operation) -> int:
    """The value after `step`, modulo 10."""
    operator, operand = step
    return (value + operand if operator == "+" else value - operand if operator == "-" else value * operand) % 10


def problem_text(start: int, steps: list[Operation], labels: str = LABELS) -> str:
    """The prompt, for example `7 a+4 b*3`."""
    return str(start) + "".join(f" {label}{op}{operand}" for label, (op, operand) in zip(labels, steps, strict=False))


def derivation_lines(values: list[int], steps: list[Operation], labels: str = LABELS) -> list[str]:
    """The problem restated, then a line a step; `values` are the start and the results."""
    named = list(zip(labels, steps, strict=False))
    given = f"Given {values[0]}" + "".join(f"{label}{op}{operand}" for label, (op, operand) in named)
    return [
        given,
        *(f"{label} {values[i]}{op}{operand}={values[i + 1]}" for i, (label, (op, operand)) in enumerate(named)),
    ]


def make_trace(start: int, steps: list[Operation], source: str = "", labels: str = LABELS) -> Trace:
    """The problem with its worked solution; `reference` is the answer and `correct` is True."""
    values = [start]
    for step in steps:
        values.append(apply_step(values[-1], step))
    named = list(zip(labels, steps, strict=False))
    lines = [*derivation_lines(values, steps, labels), f"So {values[-1]}", "Check"]
    for i in range(len(steps) - 1, -1, -1):
        label, (op, operand) = named[i]
        before = labels[i - 1] if i else "start"
        lines.append(f"{label} {values[i + 1]}{INVERSE[op]}{operand}={values[i]} {before}={values[i]} ok")
    answer = str(values[-1])
    return Trace(
        messages=({"role": "user", "content": problem_text(start, steps, labels)},),
        cot="\n".join(lines),
        answer=answer,
        source=source,
        reference=answer,
        correct=True,
        metadata={"num_steps": len(steps)},
    )
