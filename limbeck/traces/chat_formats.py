"""Parsers of formats in which the prompt and the reply are chat turns."""

from __future__ import annotations

from limbeck.errors import TraceFormatError
from limbeck.traces.chat import split_chat
from limbeck.traces.record import Parsed, Record, field, parsed_trace, reference_in, verdict_in, with_metadata
from limbeck.traces.thought import THINK, Markers, join_thought, split_thought, unclosed_thought

USED_COLUMNS = ("prompt", "completion", "system", "reference", "correct")


def parse_messages(record: Record, markers: Markers | None) -> list[Parsed]:
    """`messages` of role and content: the thought in `reasoning_content` or between markers."""
    return [_parse_turns(record, field(record, "messages"), markers)]


def parse_sharegpt(record: Record, markers: Markers | None) -> list[Parsed]:
    """ShareGPT `conversations` of from and value, perhaps with a `system` column."""
    return [_parse_turns(record, field(record, "conversations"), markers)]


def parse_prompt_completion(record: Record, markers: Markers | None) -> list[Parsed]:
    """`prompt` and `completion`, each a string or a list of turns."""
    prompt, completion = field(record, "prompt"), field(record, "completion")
    turns = list(prompt) if isinstance(prompt, list | tuple) else [{"role": "user", "content": prompt}]
    if isinstance(completion, list | tuple):
        turns += completion
    else:
        turns.append({"role": "assistant", "content": completion})
    return [_parse_turns(record, turns, markers)]


def _parse_turns(record: Record, turns: object, markers: Markers | None) -> Parsed:
    messages, reply = split_chat(turns, record.get("system"))
    if reply.reasoning is None:
        thought = split_thought(reply.text or "", markers)
    elif reply.text is None:
        thought = unclosed_thought(reply.reasoning, "missing end marker: reasoning_content without content")
    elif reply.text.lstrip().startswith((markers or THINK).start):
        raise TraceFormatError("two thoughts: one in reasoning_content, another in content")
    else:
        thought = join_thought(reply.reasoning, reply.text, markers or THINK)
    parsed = parsed_trace(messages, thought, reference_in(record, ("reference",)), verdict_in(record, ("correct",)))
    return with_metadata(parsed, record, USED_COLUMNS)
