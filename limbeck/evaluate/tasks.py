"""Problems to evaluate on, and how their answers are read and compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from limbeck.errors import ConfigError
from limbeck.evaluate.answers import AnswerStyle
from limbeck.evaluate.checking import CheckName
from limbeck.traces.trace import Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One prompt with its right answer."""

    messages: tuple[Mapping[str, str], ...]
    """Chat messages, the last one from the user."""
    reference: str | None
    """The right short answer; None makes every verdict unknown."""
    key: str
    """The same for the same prompt in every run: what pairs problems across runs."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Anything else, JSON-ready."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A named list of problems."""

    name: str
    problems: tuple[Problem, ...]
    answer_style: AnswerStyle = "auto"
    """Where the answer stands in what the model writes after its thought."""
    checker: CheckName = "math"
    """How it is compared with the reference."""


def task_from_traces(
    name: str, traces: Iterable[Trace], answer_style: AnswerStyle = "auto", checker: CheckName = "math"
) -> Task:
    """The prompts of traces as problems, with `Trace.reference` as the right answer; their thoughts are not used.

    Raises: ConfigError when there is no trace, or when none has a reference.
    """
    problems = tuple(
        Problem(messages=trace.messages, reference=trace.reference, key=trace.prompt_key, metadata=trace.metadata)
        for trace in traces
    )
    if not problems:
        raise ConfigError(f"{name}: no problems to evaluate on; give traces with a prompt and a reference answer.")
    if all(problem.reference is None for problem in problems):
        raise ConfigError(
            f"{name}: none of {len(problems)} problems has a reference answer; give traces with a `reference`."
        )
    return Task(name=name, problems=problems, answer_style=answer_style, checker=checker)
