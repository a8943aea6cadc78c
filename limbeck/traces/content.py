"""The content of one chat turn: a string, bytes, or typed parts, of which thoughts are told apart."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from limbeck.errors import TraceFormatError
from limbeck.traces.containers import decode

TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning", "thought")
_THOUGHT_KEYS = ("thinking", "reasoning", "text", "summary", "content")


class Content(NamedTuple):
    """What a turn says."""

    text: str | None
    """None where it has parts for the thought only."""
    thought: str | None = None
    """The parts of the thought, one a line; None where there is none."""


def _no_text(content: Any, place: str) -> TraceFormatError:
    if content is None:
        return TraceFormatError(f"no content: {place} is null")
    return TraceFormatError(f"content is not text: {place} is {type(content).__name__}")


def _decoded(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TraceFormatError(f"content is not text: {place} is bytes that are not UTF-8") from error


def content_of(content: Any, place: str) -> Content:
    """Text and thought of a turn's content; parts of one kind are joined. `place` says in errors where it stands.

    Raises: TraceFormatError for null, numbers, images and whatever else is not text.
    """
    if isinstance(content, str):
        return Content(content)
    if isinstance(content, bytes):
        return Content(_decoded(content, place))
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        raise _no_text(content, place)
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        (thoughts if _is_thought(part) else texts).append(_part_text(part, place))
    return Content("".join(texts) if texts or not thoughts else None, "\n".join(thoughts) if thoughts else None)


def text_of(content: Any, place: str) -> str:
    """Content that is text only, as one string.

    Raises: TraceFormatError for anything else, a part of a thought too.
    """
    found = content_of(content, place)
    if found.thought is not None or found.text is None:
        raise TraceFormatError(f"content is not text: {place} holds a part of a thought")
    return found.text


def are_parts(value: Any) -> bool:
    """Whether a list holds typed parts of one turn, not turns."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(part, Mapping) and not {"role", "from"} & present(part).keys() for part in value)
        and all("type" in part or "text" in part for part in value)
    )


def present(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are not null: a column of structs has every key of every row."""
    return {key: value for key, value in mapping.items() if value is not None}


def as_list(value: Any) -> Any:
    """A list that was written as text (JSON, or as Python prints it) as a list; anything else as it is."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = decode(value)
    except ValueError:
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return value
    return found if isinstance(found, list) else value


def _is_thought(part: Any) -> bool:
    return isinstance(part, Mapping) and (part.get("type") in THOUGHT_PARTS or part.get("thought") is True)


def _text_in(part: Mapping[str, Any]) -> Any:
    """What a part holds as its text; the parts of a thought may be a list."""
    if _is_thought(part):
        return next((part[key] for key in _THOUGHT_KEYS if part.get(key)), None)
    kind = part.get("type")
    is_text = kind in TEXT_PARTS or kind == "summary_text" or (kind is None and set(present(part)) == {"text"})
    text = part.get("text") if is_text else None
    return text if isinstance(text, str) else None


def _part_text(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = _text_in(part) if isinstance(part, Mapping) else None
    if isinstance(text, list):
        return "\n".join(_part_text(entry, place) for entry in text)
    if isinstance(text, str):
        return text
    raise TraceFormatError(f"content is not text: {place} holds a part of type {kind!r}")
