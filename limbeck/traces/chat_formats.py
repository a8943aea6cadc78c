"""Parsers of formats in which the prompt and the reply are chat turns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from limbeck.errors import TraceFormatError
from limbeck.traces.calls import TOOL_COLUMNS, tools_in
from limbeck.traces.chat import Reply, split_chat, user_turns
from limbeck.traces.content import are_parts, as_list
from limbeck.traces.record import (
    REFERENCE_COLUMNS,
    REPLY_COLUMNS,
    SYSTEM_COLUMNS,
    TURN_COLUMNS,
    VERDICT_COLUMNS,
    Parsed,
    Record,
    field,
    first_present,
    parsed_trace,
    prompt_columns,
    prompt_in,
    reference_in,
    system_in,
    verdict_in,
    with_metadata,
)
from limbeck.traces.templated import END_TAKEN_OFF, UNTEMPLATED, untemplated, untemplated_pair, without_end
from limbeck.traces.thought import KNOWN_MARKERS, THINK, Markers, Thought, join_thought, split_thought, unclosed_thought

ANSWER_COLUMNS = tuple(name for name in REFERENCE_COLUMNS if name != "solution")
"""Where a chat has its reference: a `solution` beside a chat is as often the reply once more."""
_OTHER_COLUMNS = (*SYSTEM_COLUMNS, *ANSWER_COLUMNS, *VERDICT_COLUMNS)


def parse_messages(record: Record, markers: Markers | None) -> list[Parsed]:
    """`messages` of role and content: the thought under a key or in parts of its own, or between markers."""
    return [_parse_turns(record, field(record, "messages"), markers, ("messages",))]


def parse_sharegpt(record: Record, markers: Markers | None) -> list[Parsed]:
    """ShareGPT `conversations` of from and value, perhaps with a `system` column."""
    name = first_present(record, TURN_COLUMNS[1:])
    return [_parse_turns(record, record[name], markers, TURN_COLUMNS)]


def parse_text(record: Record, markers: Markers | None) -> list[Parsed]:
    """`text`: a whole chat that a template has been over."""
    turns = untemplated(field(record, "text")) if isinstance(record.get("text"), str) else None
    if turns is None:
        raise TraceFormatError("not templated: `text` does not begin with the header of a turn")
    return [_parse_turns(record, turns, markers, ("text",), (UNTEMPLATED,))]


def parse_prompt_completion(record: Record, markers: Markers | None) -> list[Parsed]:
    """A prompt and a reply in columns of their own, each a string or a list of turns."""
    name = reply_column(record)
    if name is None:
        keys = ", ".join(str(key) for key in record)[:200] or "none"
        raise TraceFormatError(f"missing field: 'completion'; the record's keys are {keys}")
    prompt, completion = prompt_in(record), record[name]
    used = (*prompt_columns(record), name)
    templated = untemplated_pair(prompt, completion)
    if templated is not None:
        return [_parse_turns(record, templated, markers, used, (UNTEMPLATED,))]
    turns, reply = user_turns(prompt), as_list(completion)
    is_chat = isinstance(reply, list | tuple) and not are_parts(reply)
    turns += list(reply) if is_chat else [{"role": "assistant", "content": completion}]
    return [_parse_turns(record, turns, markers, used)]


def reply_column(record: Record) -> str | None:
    """The column of the reply: one that is named so, or an answer or solution in which a thought is closed."""
    for name in REPLY_COLUMNS:
        if record.get(name) is not None:
            return name
    for name in ("answer", "solution"):
        if any(markers.end in str(record.get(name)) for markers in KNOWN_MARKERS):
            return name
    return None


def _parse_turns(
    record: Record, turns: object, markers: Markers | None, used: Iterable[str], notes: tuple[str, ...] = ()
) -> Parsed:
    chat = split_chat(turns, system_in(record))
    notes = (*notes, *chat.notes)
    if chat.reply is None:
        return Parsed(None, None, notes)
    text = None if chat.reply.text is None else without_end(chat.reply.text)
    if text != chat.reply.text and UNTEMPLATED not in notes:
        notes = (*notes, END_TAKEN_OFF)
    thought = _thought(chat.reply._replace(text=text), markers)
    names = [name for name in ANSWER_COLUMNS if name not in used]
    parsed = parsed_trace(
        chat.messages, thought, reference_in(record, names), verdict_in(record, VERDICT_COLUMNS), notes
    )
    assert parsed.trace is not None
    trace = replace(parsed.trace, tool_calls=chat.reply.calls, tools=tools_in(record))
    return with_metadata(
        parsed._replace(trace=trace, weights=chat.weights), record, (*used, *_OTHER_COLUMNS, *TOOL_COLUMNS)
    )


def _thought(reply: Reply, markers: Markers | None) -> Thought:
    has_calls = bool(reply.calls)
    if reply.reasoning is None:
        return split_thought(reply.text or "", markers, has_calls=has_calls)
    if reply.text is None:
        return unclosed_thought(reply.reasoning, "missing end marker: a thought without content")
    if reply.text.lstrip().startswith((markers or THINK).start):
        raise TraceFormatError("two thoughts: one under a key of its own, another in the content")
    return join_thought(reply.reasoning, reply.text, markers or THINK, has_calls=has_calls)
