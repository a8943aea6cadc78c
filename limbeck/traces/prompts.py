"""Records that hold a prompt and no reply: what `traces generate` and `evaluate` are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from limbeck.errors import TraceFormatError
from limbeck.traces.chat import is_open, prompt_messages, without_reply
from limbeck.traces.chat_formats import reply_column
from limbeck.traces.column_formats import COT_COLUMNS
from limbeck.traces.record import (
    PROMPT_COLUMNS,
    REFERENCE_COLUMNS,
    REPLY_COLUMNS,
    SYSTEM_COLUMNS,
    TURN_COLUMNS,
    Parsed,
    Record,
    parsed_trace,
    prompt_columns,
    prompt_in,
    reference_in,
    system_in,
    user_prompt,
    with_metadata,
)
from limbeck.traces.thought import Markers, Thought

NO_REPLY = "no reply"


def parse_prompts(record: Record, markers: Markers | None) -> list[Parsed]:
    """A prompt column or turns, and perhaps a reference; there is no thought and no answer.

    The trace's problem is that there is no reply, so whatever trains on traces refuses it unless told to keep bad ones.
    """
    turns = _set_in(record, TURN_COLUMNS)
    if turns is None and _set_in(record, PROMPT_COLUMNS) is None:
        keys = ", ".join(str(key) for key in record)[:200] or "none"
        raise TraceFormatError(f"missing field: one of {', '.join((*TURN_COLUMNS, *PROMPT_COLUMNS))}; found {keys}")
    system = system_in(record)
    messages = user_prompt(prompt_in(record), system) if turns is None else prompt_messages(record[turns], system)
    used = (*TURN_COLUMNS, *(prompt_columns(record) if turns is None else ()), *REFERENCE_COLUMNS, *SYSTEM_COLUMNS)
    thought = Thought(None, None, cot_closed=False, problem=_no_reply(record, used))
    parsed = parsed_trace(messages, thought, _reference(record))
    return [with_metadata(parsed, record, used)]


def prompt_alone(record: Record) -> list[Parsed]:
    """As `parse_prompts`, of a record whose reply is of no interest or cannot be read."""
    turns = {name: without_reply(record[name]) for name in TURN_COLUMNS if record.get(name) is not None}
    return parse_prompts({**record, **turns}, None)


def _no_reply(record: Record, used: Sequence[str]) -> str:
    """What the record holds instead of a reply."""
    problem = f"{NO_REPLY}: the record holds a prompt only"
    references = [name for name in REFERENCE_COLUMNS if record.get(name) is not None]
    others = [str(name) for name in record if record[name] is not None and name not in used]
    if references:
        return f"{problem} ({', '.join(references)}: read as its reference; fields can call one of them completion)"
    return f"{problem} (and {', '.join(others)[:80]}; fields can call one of them completion)" if others else problem


def _set_in(record: Record, names: Iterable[str]) -> str | None:
    """The first of `names` that the record holds."""
    return next((name for name in names if record.get(name) is not None), None)


def is_prompt(record: Record) -> bool:
    """Whether a record holds a prompt and nothing that could be a reply; an answer or solution is a reference."""
    if reply_column(record) is not None or _set_in(record, (*COT_COLUMNS, "generations")) is not None:
        return False
    turns = _set_in(record, TURN_COLUMNS)
    if turns is not None:
        return is_open(record[turns])
    name = _set_in(record, PROMPT_COLUMNS)
    if name is None:
        return False
    return not isinstance(record[name], list) or is_open(record[name])


def _reference(record: Record) -> str | None:
    replies = [name for name in REPLY_COLUMNS if record.get(name) is not None]
    return reference_in(record, [name for name in REFERENCE_COLUMNS if name not in replies])
