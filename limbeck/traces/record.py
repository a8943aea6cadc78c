"""What the parsers share: their result, and fields read from a record with their types checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from limbeck.errors import TraceFormatError
from limbeck.traces.chat import Message, prompt_messages, user_turns
from limbeck.traces.content import text_of
from limbeck.traces.templated import untemplated
from limbeck.traces.thought import Thought
from limbeck.traces.trace import Trace

Record = Mapping[str, Any]

TURN_COLUMNS = ("messages", "conversations", "conversation", "contents")
PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction", "query")
REPLY_COLUMNS = ("completion", "response", "output", "generated_solution", "generation", "reply", "model_output")
SYSTEM_COLUMNS = ("system", "system_prompt")
REFERENCE_COLUMNS = (
    "reference",
    "expected_answer",
    "ground_truth",
    "reference_answer",
    "gold_answer",
    "reward_model",
    "answer",
    "ground_truth_solution",
    "solution",
)
"""In this order: a short answer stands before a worked solution. `reward_model` holds `ground_truth` (verl)."""
VERDICT_COLUMNS = ("correct", "is_correct")


class Parsed(NamedTuple):
    """One reply of a record: the trace in it, and what is wrong with it."""

    trace: Trace | None
    """None when nothing usable was found, or nothing is to be trained."""
    problem: str | None = None
    """None for a good trace; a trace with a problem is used only when the user asked to keep such."""
    notes: tuple[str, ...] = ()
    """What was joined, taken off or passed over, to be counted; a note without trace and problem says why it goes."""
    unread: tuple[str, ...] = ()
    """Columns that are no part of the prompt, the reply, the reference or the verdict."""
    weights: tuple[float, ...] = ()
    """What each assistant turn of a chat weighs as it is marked, the reply last."""


def parsed_trace(
    messages: tuple[Message, ...],
    thought: Thought,
    reference: str | None = None,
    correct: bool | None = None,
    notes: tuple[str, ...] = (),
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
    return Parsed(trace, thought.problem, (*notes, *thought.notes))


def with_metadata(parsed: Parsed, record: Record, used: Iterable[str]) -> Parsed:
    """`parsed` with the columns of `record` that are plain values, and not `used` elsewhere, as metadata."""
    if parsed.trace is None:
        return parsed
    used = set(used)
    unread = {str(key): value for key, value in record.items() if key not in used and value is not None}
    rest = {key: value for key, value in unread.items() if _is_plain(value)}
    trace = replace(parsed.trace, metadata={**parsed.trace.metadata, **rest})
    return parsed._replace(trace=trace, unread=(*parsed.unread, *unread))


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
    """A prompt column, a string, typed parts or a list of turns, as messages; templated text is taken apart."""
    turns = untemplated(prompt) if isinstance(prompt, str) else None
    if turns is None:
        return prompt_messages(user_turns(prompt), system)
    return prompt_messages(turns[:-1] if turns[-1]["role"] in ("assistant", "model") else turns, system)


def prompt_in(record: Record) -> Any:
    """The prompt column of a record; the `input` beside an `instruction` is part of it.

    Raises: TraceFormatError when there is none.
    """
    name = first_present(record, PROMPT_COLUMNS)
    more = record.get("input") if name == "instruction" else None
    if more is None or (isinstance(more, str) and not more.strip()):
        return record[name]
    return f"{text_of(record[name], name)}\n\n{text_of(more, 'input')}"


def prompt_columns(record: Record) -> tuple[str, ...]:
    """The columns that `prompt_in` reads."""
    name = first_present(record, PROMPT_COLUMNS)
    return (name, "input") if name == "instruction" else (name,)


def system_in(record: Record) -> Any:
    """The system prompt beside the turns; None without one."""
    return next((record[name] for name in SYSTEM_COLUMNS if record.get(name) is not None), None)


def _only_entry(entries: Iterable[Any]) -> str | None:
    distinct = list(dict.fromkeys(str(entry) for entry in entries if entry is not None))
    if len(distinct) > 1:
        raise TraceFormatError(f"several references: a list of {len(distinct)} different ones; give one")
    return distinct[0] if distinct else None


def reference_in(record: Record, names: Iterable[str]) -> str | None:
    """The reference answer in the first of `names` that is set; numbers and flags become text, a list of one is its
    entry."""
    value = next((record[name] for name in names if record.get(name) is not None), None)
    if isinstance(value, Mapping) and "ground_truth" in value:
        value = value["ground_truth"]
    if isinstance(value, list | tuple):
        value = _only_entry(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return text_of(value, "the reference")
    if isinstance(value, int | float):
        return str(value)
    raise TraceFormatError(f"reference is not text: it is {type(value).__name__}")


def verdict_in(record: Record, names: Iterable[str]) -> bool | None:
    """Whether the answer was found right, in the first of `names` that is set: a flag, 0 or 1, or a word."""
    value = next((record[name] for name in names if record.get(name) is not None), None)
    found = as_flag(value)
    if value is not None and found is None:
        raise TraceFormatError(f"verdict is not true, false or null: it is {str(value)[:40]!r}")
    return found


def as_flag(value: Any) -> bool | None:
    """A flag, 0 or 1, or yes, no, true, false as a flag; None for anything else."""
    words = {"yes": True, "no": False, "true": True, "false": False, "1": True, "0": False}
    if isinstance(value, str):
        return words.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def flags_in(record: Record, name: str, count: int) -> list[bool | None]:
    """A list of `count` flags; all None when the record does not hold it."""
    flags = record.get(name)
    if flags is None:
        return [None] * count
    if not isinstance(flags, list) or len(flags) != count:
        held = f"{len(flags)} flags" if isinstance(flags, list) else type(flags).__name__
        raise TraceFormatError(f"unequal lists: {count} generations but {name} holds {held}")
    found = [as_flag(flag) for flag in flags]
    if any(flag is not None and is_right is None for flag, is_right in zip(flags, found, strict=True)):
        raise TraceFormatError(f"flag is not true, false or null: in {name}")
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
