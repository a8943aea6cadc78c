"""Which turns of a chat are trained: the last one, or everything that the assistant wrote.

What tools answered and what users said is context in either case. Thoughts inside the text of trained turns go to a
field of their own, so that a chat template writes them as it writes any thought.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from limbeck.errors import TraceFormatError
from limbeck.traces.chat import EARLIER
from limbeck.traces.record import Parsed
from limbeck.traces.thought import KNOWN_MARKERS, Markers, split_thought

Turns = Literal["auto", "last", "all"]


def choose_turns(parsed: Parsed, turns: Turns, markers: Markers | None = None) -> Parsed:
    """A parsed chat with the weights of the turns that are trained; other records as they are.

    Args:
      parsed: with the weights of all turns as they are marked.
      turns: last | all | auto: all of a chat that uses tools, the last of any other.
      markers: the markers around thoughts; None finds the known ones.
    Returns: the same with `turn_weights`, or with a problem where a trained turn cannot be read.
    """
    trace, weights = parsed.trace, parsed.weights
    if trace is None or not weights:
        return parsed
    is_all = turns == "all" or (turns == "auto" and trace.uses_tools)
    if not is_all:
        weights = (*[0.0] * (len(weights) - 1), weights[-1])
    if not any(weights[:-1]) and weights[-1] == 1:
        weights = ()
    try:
        messages = _split(trace.messages, weights, markers)
    except TraceFormatError as error:
        return Parsed(None, str(error))
    notes = tuple(note for note in parsed.notes if note != EARLIER or not any(weights[:-1]))
    # Between calls a model need not think, and what it says to a user it often does not think about.
    is_thoughtless = parsed.problem is not None and parsed.problem.startswith("no thought")
    problem = None if is_thoughtless and (any(weights[:-1]) or trace.uses_tools) else parsed.problem
    return parsed._replace(
        trace=replace(trace, messages=messages, turn_weights=weights), problem=problem, notes=notes, weights=()
    )


def _split(
    messages: tuple[Mapping[str, Any], ...], weights: tuple[float, ...], markers: Markers | None
) -> tuple[Mapping[str, Any], ...]:
    """The messages with the thoughts of trained turns under `reasoning_content`."""
    left = iter(weights)
    return tuple(
        _with_thought(message, markers) if message["role"] == "assistant" and next(left, 0.0) else message
        for message in messages
    )


def _with_thought(message: Mapping[str, Any], markers: Markers | None) -> Mapping[str, Any]:
    known = [markers] if markers else KNOWN_MARKERS
    if not any(marker in message["content"] for pair in known for marker in pair):
        return message
    if "reasoning_content" in message:
        raise TraceFormatError("two thoughts: one under a key of its own, another in the content of an earlier turn")
    thought = split_thought(message["content"], markers, has_calls="tool_calls" in message)
    if not thought.cot_closed:
        raise TraceFormatError("missing end marker: an earlier turn of the assistant ends inside its thought")
    return {**message, "content": thought.answer or "", "reasoning_content": thought.cot or ""}
