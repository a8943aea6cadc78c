"""What the parsers share: their result, and fields read from a record with their types checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from limbeck.errors import TraceFormatError
from limbeck.traces.chat import Message, prompt_messages
from limbeck.traces.thought import Thought
from limbeck.traces.trace import Trace

Record = Mapping[str, Any]


class Parsed(NamedTuple):
    """One reply of a record: the trace in it, and what is wrong with it."""

    trace: Trace | None
    """None when nothing usable was found."""
    problem: str | None = None
    """None for a good trace; a trace with a problem is used only when the user asked to keep such."""


def parsed_trace(
    messages: tuple[Message, ...], thought: Thought, reference: str | None = None, correct: bool | None = None
) -> Parsed:
    """A trace of a prompt and the thought and answer that follow it."""
    trace = Trace(
        messages=messages,
        cot=thought.cot,
        answer=thought.answer,
        cot_closed=thought.cot_closed,
        reference=reference,
        correct=correct,
    )
    return Parsed(trace, thought.problem)


def with_metadata(parsed: Parsed, record: Record, used: Iterable[str]) -> Parsed:
    """`parsed` with the columns of `record` that are plain values, and not `used` elsewhere, as metadata."""
    if parsed.trace is None:
        return parsed
    used = set(used)
    rest = {str(key): value for key, value in record.items() if key not in used and _is_plain(value)}
    return parsed._replace(trace=replace(parsed.trace, metadata={**parsed.trace.metadata, **rest}))


def field(record: Record, name: str) -> Any:
    """A field that must be there.

    Raises: TraceFormatError, naming the record's keys, when it is not.
    """
    if name not in record:
        keys = ", ".join(str(key) for key in record)[:200] or "none"
        raise TraceFormatError(f"missing field: {name!r}; the record's keys are {keys}")
    return record[name]


def first_present(record: Record, names: Iterable[str]) -> str:
    """The first of `names` that the record holds.

    Raises: TraceFormatError when it holds none.
    """
    for name in names:
        if record.get(name) is not None:
            return name
    keys = ", ".join(str(key) for key in record)[:200] or "none"
    raise TraceFormatError(f"missing field: one of {', '.join(names)}; the record's keys are {keys}")


def user_prompt(prompt: Any, system: Any = None) -> tuple[Message, ...]:
    """A prompt column, a string or a list of turns, as messages."""
    turns = prompt if isinstance(prompt, list | tuple) else [{"role": "user", "content": prompt}]
    return prompt_messages(turns, system)


def reference_in(record: Record, names: Iterable[str]) -> str | None:
    """The reference answer in the first of `names` that is set; numbers become text."""
    value = next((record[name] for name in names if record.get(name) is not None), None)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise TraceFormatError(f"reference is not text: it is {type(value).__name__}")


def verdict_in(record: Record, names: Iterable[str]) -> bool | None:
    """Whether the answer was found right, in the first of `names` that is set: a flag, or s1K's Yes or No."""
    value = next((record[name] for name in names if record.get(name) is not None), None)
    words = {"yes": True, "no": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    if value is None or isinstance(value, bool):
        return value
    raise TraceFormatError(f"verdict is not true, false or null: it is {str(value)[:40]!r}")


def flags_in(record: Record, name: str, count: int) -> list[bool | None]:
    """A list of `count` flags; all None when the record does not hold it."""
    flags = record.get(name)
    if flags is None:
        return [None] * count
    if not isinstance(flags, list) or len(flags) != count:
        found = f"{len(flags)} flags" if isinstance(flags, list) else type(flags).__name__
        raise TraceFormatError(f"unequal lists: {count} generations but {name} holds {found}")
    if any(flag is not None and not isinstance(flag, bool) for flag in flags):
        raise TraceFormatError(f"flag is not true, false or null: in {name}")
    return flags


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
