"""Records that hold a prompt and no reply: what `traces generate` is given when nothing has been answered yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.errors import TraceFormatError
from limbeck.traces.chat import ROLES
from limbeck.traces.column_formats import COT_COLUMNS, PROMPT_COLUMNS
from limbeck.traces.record import Parsed, Record, parsed_trace, reference_in, user_prompt, with_metadata
from limbeck.traces.thought import Markers, Thought

TURN_COLUMNS = ("messages", "conversations")
REFERENCE_COLUMNS = ("reference", "ground_truth_solution", "answer", "solution")
"""A reply could stand in the last two; they are references where the user names the format."""
REPLY_COLUMNS = {"answer", "completion", "generations", "output", "response", "solution"}
REPLY_COLUMNS |= {*COT_COLUMNS, *COT_COLUMNS.values()}


def parse_prompts(record: Record, markers: Markers | None) -> list[Parsed]:
    """A prompt column or turns that end with the user, and perhaps a reference; there is no thought and no answer.

    The trace's problem is that there is no reply, so whatever trains on traces refuses it unless told to keep bad ones.
    """
    prompt = next((name for name in (*TURN_COLUMNS, *PROMPT_COLUMNS) if record.get(name) is not None), None)
    if prompt is None:
        keys = ", ".join(str(key) for key in record)[:200] or "none"
        raise TraceFormatError(f"missing field: one of {', '.join((*TURN_COLUMNS, *PROMPT_COLUMNS))}; found {keys}")
    messages = user_prompt(record[prompt], record.get("system"))
    thought = Thought(None, None, cot_closed=False, problem="no reply: the record holds a prompt only")
    parsed = parsed_trace(messages, thought, reference_in(record, REFERENCE_COLUMNS))
    return [with_metadata(parsed, record, (*TURN_COLUMNS, *PROMPT_COLUMNS, *REFERENCE_COLUMNS, "system"))]


def is_prompt(record: Record) -> bool:
    """Whether a record holds a prompt and nothing that could be a reply."""
    if record.keys() & REPLY_COLUMNS or not record.keys() & {*TURN_COLUMNS, *PROMPT_COLUMNS}:
        return False
    name = next((name for name in (*TURN_COLUMNS, "prompt") if name in record), None)
    turns = record[name] if name is not None else None
    if not isinstance(turns, list):
        return turns is None or (isinstance(turns, str) and name not in TURN_COLUMNS)
    return bool(turns) and isinstance(turns[-1], Mapping) and _role(turns[-1]) == "user"


def _role(turn: Mapping[str, Any]) -> str | None:
    return ROLES.get(str(turn.get("role", turn.get("from"))))
