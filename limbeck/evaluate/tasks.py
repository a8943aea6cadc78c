"""A task: problems with known answers. Any list of traces with references is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from limbeck.errors import ConfigError
from limbeck.traces.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a model is asked, and the right answer."""

    messages: tuple[Mapping[str, str], ...]
    """Chat messages, the last one from the user."""
    reference: str
    """The official or verified answer."""
    key: str
    """Hash of the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Problems in a fixed order."""

    name: str
    problems: tuple[Problem, ...]


def task_from_traces(name: str, traces: Sequence[Trace]) -> Task:
    """The prompts and references of traces.

    Raises: ConfigError when a trace has no reference, or there is no trace.
    """
    without = sum(trace.reference is None for trace in traces)
    if without or not traces:
        raise ConfigError(f"{name}: {without} of {len(traces)} problems have no reference answer to check against.")
    problems = tuple(
        Problem(messages=trace.messages, reference=trace.reference or "", key=trace.prompt_key) for trace in traces
    )
    return Task(name=name, problems=problems)
