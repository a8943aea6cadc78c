"""Records of the common trace formats to traces: one function a format, each pure.

A parser gives one `Parsed` for each reply in the record and raises TraceFormatError when there is none.
A message begins with a short fixed reason, then a colon and the details: the reasons are counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any

from limbeck.errors import TraceFormatError
from limbeck.traces.chat import prompt_messages
from limbeck.traces.chat_formats import (
    parse_messages,
    parse_prompt_completion,
    parse_sharegpt,
    parse_text,
    reply_column,
)
from limbeck.traces.column_formats import COT_COLUMNS, GSM8K_MARKER, parse_columns, parse_gsm8k, parse_reasoning_gym
from limbeck.traces.prompts import NO_REPLY, is_prompt, parse_prompts
from limbeck.traces.record import (
    PROMPT_COLUMNS,
    REFERENCE_COLUMNS,
    REPLY_COLUMNS,
    SYSTEM_COLUMNS,
    TURN_COLUMNS,
    VERDICT_COLUMNS,
    Parsed,
    Record,
)
from limbeck.traces.templated import untemplated
from limbeck.traces.thought import Markers, Thought, join_thought, unclosed_thought
from limbeck.traces.trace import Trace, from_json

Parser = Callable[[Record, Markers | None], list[Parsed]]

_LIMBECK_TYPES: dict[str, tuple[type, ...]] = {
    "limbeck_trace": (int,),
    "messages": (list,),
    "cot": (str, NoneType),
    "answer": (str, NoneType),
    "cot_closed": (bool,),
    "source": (str,),
    "reference": (str, NoneType),
    "correct": (bool, NoneType),
    "metadata": (dict,),
    "tool_calls": (list,),
    "tools": (list,),
    "turn_weights": (list,),
}


def parse_record(record: Any, format_name: str, markers: Markers | None = None) -> list[Parsed]:
    """The traces of one record; a problem of the whole record is one `Parsed` without a trace.

    Args:
        record: a decoded line, row or list entry.
        format_name: a key of `FORMATS`.
        markers: the markers around the thought, where the format has any; None finds the known ones.
    """
    try:
        if not isinstance(record, Mapping):
            raise TraceFormatError(f"not an object: the record is {type(record).__name__}")
        return [_refuse_surrogates(parsed) for parsed in FORMATS[format_name](record, markers)]
    except TraceFormatError as error:
        return [Parsed(None, str(error))]


def detect(record: Any) -> str:
    """The name of the format that `record` is in.

    Raises: TraceFormatError, naming the formats and the record's keys, when none fits.
    """
    if not isinstance(record, Mapping):
        raise TraceFormatError(f"not an object: the record is {type(record).__name__}")
    for name, fits in _SIGNS.items():
        if fits(record):
            return name
    keys = ", ".join(f"{key}{' (null)' if value is None else ''}" for key, value in record.items())[:200] or "none"
    raise TraceFormatError(
        f"unknown format: the record's keys are {keys}; known formats are {', '.join(FORMATS)}: "
        "name one with format, or rename keys with fields"
    )


def with_known_names(record: Record) -> Record:
    """The record with the columns that are known but for their case (Question, Answer) under their known names."""
    found = {}
    for key, value in record.items():
        lower = str(key).lower()
        found[lower if lower in _KNOWN and lower not in record else key] = value
    return found


def parse_limbeck(record: Record, markers: Markers | None) -> list[Parsed]:
    """limbeck's own format, as `trace.to_json` writes it."""
    _check_limbeck(record)
    messages = prompt_messages(record.get("messages"))
    cot, answer = record.get("cot"), record.get("answer")
    if not record.get("cot_closed", True):
        if answer is not None:
            raise TraceFormatError("answer after an open thought: cot_closed is false, so answer must be null")
        if cot is None:
            thought = Thought(None, None, cot_closed=False, problem=f"{NO_REPLY}: cot and answer are null")
        else:
            thought = unclosed_thought(cot, "missing end marker: cot_closed is false")
    elif not record.get("tool_calls") and (answer is None or not answer.strip()):
        raise TraceFormatError("empty answer")
    elif cot is None:
        thought = Thought(None, answer, problem="no thought: cot is null")
    else:
        thought = join_thought(cot, answer or "", has_calls=bool(record.get("tool_calls")))
    return [Parsed(from_json({**record, "messages": messages, "cot": cot, "answer": answer}), thought.problem)]


def _check_limbeck(record: Record) -> None:
    if record.get("limbeck_trace") != 1:
        raise TraceFormatError(
            f"unknown version: limbeck_trace is {str(record.get('limbeck_trace'))[:40]!r}, 1 is accepted"
        )
    for name, value in record.items():
        if name not in _LIMBECK_TYPES:
            raise TraceFormatError(f"unknown key: {str(name)[:40]!r}; known are {', '.join(_LIMBECK_TYPES)}")
        if not isinstance(value, _LIMBECK_TYPES[name]):
            accepted = " or ".join(kind.__name__ for kind in _LIMBECK_TYPES[name])
            raise TraceFormatError(f"wrong type: {name} is {type(value).__name__}, expected {accepted}")


FORMATS: dict[str, Parser] = {
    "limbeck": parse_limbeck,
    "messages": parse_messages,
    "sharegpt": parse_sharegpt,
    "prompt_completion": parse_prompt_completion,
    "text": parse_text,
    "columns": parse_columns,
    "gsm8k": parse_gsm8k,
    "reasoning_gym": parse_reasoning_gym,
    "prompts": parse_prompts,
}


_KNOWN = {*TURN_COLUMNS, *PROMPT_COLUMNS, *REPLY_COLUMNS, *SYSTEM_COLUMNS, *REFERENCE_COLUMNS, *VERDICT_COLUMNS}
_KNOWN |= {"input", "text", "generations", *COT_COLUMNS}


def _has(record: Record, *names: str) -> bool:
    """Whether one of the columns is there; a null is none, since a row of a table has every column."""
    return any(record.get(name) is not None for name in names)


def _has_columns(record: Record) -> bool:
    if not _has(record, *PROMPT_COLUMNS):
        return False
    return _has(record, "generations") or any(
        _has(record, cot) and _has(record, *answers) for cot, answers in COT_COLUMNS.items()
    )


# In this order: OpenR1-Math rows hold `messages` too, but only those of the first generation; and prompts without a
# reply stand under the same names as prompts with one.
_SIGNS: dict[str, Callable[[Record], bool]] = {
    "limbeck": lambda record: "limbeck_trace" in record,
    "columns": _has_columns,
    "reasoning_gym": lambda record: (
        _has(record, "question") and _has(record, "answer") and isinstance(record.get("metadata"), Mapping)
    ),
    "gsm8k": lambda record: _has(record, "question") and GSM8K_MARKER in str(record.get("answer")),
    "prompts": is_prompt,
    "messages": lambda record: _has(record, "messages"),
    "sharegpt": lambda record: _has(record, *TURN_COLUMNS[1:]),
    "prompt_completion": lambda record: _has(record, *PROMPT_COLUMNS) and reply_column(record) is not None,
    "text": lambda record: isinstance(record.get("text"), str) and untemplated(record["text"]) is not None,
}


def _refuse_surrogates(parsed: Parsed) -> Parsed:
    """JSON can spell half a character (a lone surrogate), which no tokenizer and no file can take."""
    trace = parsed.trace
    if trace is None:
        return parsed
    for text in _texts(trace):
        try:
            text.encode()
        except UnicodeEncodeError:
            return Parsed(None, "not valid Unicode: the text holds half of a surrogate pair")
    return parsed


def _texts(trace: Trace) -> Iterator[str]:
    for message in trace.messages:
        yield from (value for value in message.values() if isinstance(value, str))
    yield json.dumps([trace.tools, trace.tool_calls, [m.get("tool_calls") for m in trace.messages]], ensure_ascii=False)
    yield from (text for text in (trace.cot, trace.answer, trace.reference) if text)
    yield from (value for value in trace.metadata.values() if isinstance(value, str))
