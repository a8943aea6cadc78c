"""Splitting what a model wrote into its thought and its answer.

Only the reply is looked at, never the prompt, so a prompt that quotes the markers cannot move a boundary.
What cannot be used at all raises; what can be used with a loss is returned with its `problem`.
"""

from __future__ import annotations

from typing import NamedTuple

from limbeck.errors import TraceFormatError


class Markers(NamedTuple):
    """The two strings around a thought."""

    start: str
    end: str


THINK = Markers("<think>", "</think>")
SKY_T1 = Markers("<|begin_of_thought|>", "<|end_of_thought|>")
"""Sky-T1, OpenThoughts and Bespoke-Stratos; their answers stand between `SOLUTION`."""
SOLUTION = Markers("<|begin_of_solution|>", "<|end_of_solution|>")
KNOWN_MARKERS = (THINK, SKY_T1)
QUOTED_END = "the first end marker closes the thought, and the answer holds another one"


class Thought(NamedTuple):
    """Thought and answer without their markers and the blank space around them."""

    cot: str | None
    """None when the reply holds no thought."""
    answer: str | None
    """None when the reply ends inside the thought."""
    cot_closed: bool = True
    problem: str | None = None
    """`reason` or `reason: detail` when the reply is usable only if the user asked to keep it; else None."""
    notes: tuple[str, ...] = ()
    """What was decided about the reply, to be counted."""


def _check_markers(reply: str, before: str, pair: Markers) -> None:
    if reply.count(pair.start) > 1 or (reply.count(pair.end) > 1 and pair.start not in reply.partition(pair.end)[0]):
        raise TraceFormatError(f"two thoughts: a reply holds {pair.start!r} and {pair.end!r} once each")
    if pair.end in before:
        raise TraceFormatError(f"markers exchanged: {pair.end!r} stands before {pair.start!r}")
    if before.strip():
        raise TraceFormatError(f"text before the thought: the reply must begin with {pair.start!r}")


def split_thought(reply: str, markers: Markers | None = None, *, has_calls: bool = False) -> Thought:
    """Split `reply` at its markers; the start marker may be missing, as it is where the template prefills it.

    Args:
        reply: the text of the last assistant turn.
        markers: the pair to look for; None finds think tags or Sky-T1 tags.
        has_calls: whether the turn calls tools, so that it need not say anything.

    Raises: TraceFormatError for text before the thought, repeated or exchanged markers, or an empty answer.
    """
    pair = markers or _find_pair(reply)
    if pair is None or (pair.start not in reply and pair.end not in reply):
        return Thought(None, "") if has_calls and not reply.strip() else _without_thought(reply, pair)
    before, start, rest = reply.rpartition(pair.start)
    _check_markers(reply, before, pair)
    cot, end, answer = rest.partition(pair.end)
    if not end:
        return unclosed_thought(cot, f"missing end marker: {start!r} is never followed by {pair.end!r}")
    problem = None
    if pair == SKY_T1:
        answer, problem = _strip_solution(answer)
    joined = join_thought(cot, answer, pair, problem, has_calls=has_calls)
    return joined._replace(notes=(QUOTED_END,) if pair.end in answer else ())


def join_thought(
    cot: str, answer: str, markers: Markers = THINK, problem: str | None = None, *, has_calls: bool = False
) -> Thought:
    """Thought and answer that came apart already, stripped and checked.

    Raises: TraceFormatError for an empty answer, or a marker inside the thought (templates split there).
    """
    cot, answer = cot.strip(), answer.strip()
    for marker in (*THINK, *markers):
        if marker in cot:
            raise TraceFormatError(f"marker inside the thought: {marker!r}")
    if not answer and not has_calls:
        raise TraceFormatError("empty answer")
    return Thought(cot, answer, problem=problem if cot else "empty thought")


def unclosed_thought(cot: str, problem: str) -> Thought:
    """A thought that never ended.

    Raises: TraceFormatError when there is no thought either.
    """
    if not cot.strip():
        raise TraceFormatError("empty reply: it holds a start marker and nothing else")
    return Thought(cot.strip(), None, cot_closed=False, problem=problem)


def _find_pair(reply: str) -> Markers | None:
    # The pair that opens the reply rules: the other one is then a quotation.
    opening = next((pair for pair in KNOWN_MARKERS if reply.lstrip().startswith(pair.start)), None)
    return opening or next((pair for pair in KNOWN_MARKERS if pair.start in reply or pair.end in reply), None)


def _without_thought(reply: str, pair: Markers | None) -> Thought:
    answer, problem = reply.strip(), "no thought"
    if pair is None and answer.startswith(SOLUTION.start):
        answer, _ = _strip_solution(answer)
    if not answer:
        raise TraceFormatError("empty reply: neither thought nor answer")
    known = [pair] if pair else list(KNOWN_MARKERS)
    found = " or ".join(f"{markers.start} ... {markers.end}" for markers in known)
    return Thought(None, answer, problem=f"{problem}: the reply does not hold {found}; markers can name another pair")


def _strip_solution(text: str) -> tuple[str, str | None]:
    """The text between the solution markers, or all of it when there are none, and what is wrong with it."""
    text = text.strip()
    if SOLUTION.start not in text and SOLUTION.end not in text:
        return text, None
    if not text.startswith(SOLUTION.start) or text.count(SOLUTION.start) > 1 or text.count(SOLUTION.end) > 1:
        raise TraceFormatError(f"solution markers: the answer must begin with one {SOLUTION.start!r}")
    solution, end, after = text.removeprefix(SOLUTION.start).partition(SOLUTION.end)
    if after.strip():
        raise TraceFormatError(f"text after the solution: nothing may follow {SOLUTION.end!r}")
    return solution.strip(), None if end else f"missing end of solution: no {SOLUTION.end!r}"
