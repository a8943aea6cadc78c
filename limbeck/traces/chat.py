"""Lists of chat turns, from whatever keys and role names they use, to prompt messages and one reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from limbeck.errors import TraceFormatError

Message = dict[str, str]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Role names of the common formats and what limbeck calls them."""


class Reply(NamedTuple):
    """The last assistant turn."""

    text: str | None
    """None when the turn has no content, as when a server cut the reply inside its thought."""
    reasoning: str | None
    """The thought, where it has its own field; else None."""


def split_chat(turns: Any, system: Any = None) -> tuple[tuple[Message, ...], Reply]:
    """Prompt messages and the reply to them.

    Args:
        turns: list of mappings with `role` and `content`, or `from` and `value`; the assistant's last.
        system: a system prompt kept apart from the turns; None or blank when there is none.

    Raises: TraceFormatError for whatever is not such a chat.
    """
    turns = _turn_list(turns)
    if _role(turns[-1]) != "assistant":
        if not any(_role(turn) == "assistant" for turn in turns):
            raise TraceFormatError("no assistant turn")
        raise TraceFormatError(f"last turn not from the assistant: it is from {_role(turns[-1])!r}")
    prompt = prompt_messages(turns[:-1], system)
    reasoning = _reasoning(turns[-1])
    content = _content(turns[-1])
    if content is None and reasoning is None:
        raise TraceFormatError("no content: the last assistant turn is null")
    return prompt, Reply(None if content is None else text_of(content, "the last assistant turn"), reasoning)


def prompt_messages(turns: Any, system: Any = None) -> tuple[Message, ...]:
    """Turns as messages with `role` and `content`, a separate system prompt in front of them.

    Raises: TraceFormatError when no turn, or not the last one, is from the user, or when it is blank.
    """
    messages = [_message(turn) for turn in _turn_list(turns, allow_empty=True)]
    if not any(message["role"] == "user" for message in messages):
        raise TraceFormatError("no user turn")
    if messages[-1]["role"] != "user":
        raise TraceFormatError(f"prompt does not end with the user: it ends with {messages[-1]['role']!r}")
    if not messages[-1]["content"].strip():
        raise TraceFormatError("empty prompt")
    return (*_system_message(system, messages), *messages)


def text_of(content: Any, place: str) -> str:
    """Content as one string; a list of parts is joined. `place` says in errors where the content stands.

    Raises: TraceFormatError for null, numbers, images and whatever else is not text.
    """
    if isinstance(content, str):
        return content
    if content is None:
        raise TraceFormatError(f"no content: {place} is null")
    if not isinstance(content, Sequence):
        raise TraceFormatError(f"content is not text: {place} is {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise TraceFormatError(f"content is not text: {place} holds a part of type {kind!r}")
        texts.append(part["text"])
    return "".join(texts)


def _turn_list(turns: Any, allow_empty: bool = False) -> list[Mapping[str, Any]]:
    if not isinstance(turns, list | tuple):
        raise TraceFormatError(f"turns are not a list: found {type(turns).__name__}")
    if not turns and not allow_empty:
        raise TraceFormatError("no turns: the list of turns is empty")
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise TraceFormatError(f"turn is not an object: found {type(turn).__name__}")
    return list(turns)


def _message(turn: Mapping[str, Any]) -> Message:
    role = _role(turn)
    message = {"role": role, "content": text_of(_content(turn), f"a turn of the {role}")}
    reasoning = _reasoning(turn)
    if reasoning is not None:
        # Whether an earlier thought is shown again is the template's decision.
        message["reasoning_content"] = reasoning
    return message


def _role(turn: Mapping[str, Any]) -> str:
    name = turn.get("role", turn.get("from"))
    if not isinstance(name, str) or name not in ROLES:
        raise TraceFormatError(f"unknown role: {str(name)[:40]!r}, accepted are {', '.join(ROLES)}")
    return ROLES[name]


def _content(turn: Mapping[str, Any]) -> Any:
    if turn.get("tool_calls"):
        raise TraceFormatError("tool calls: only text turns can be distilled")
    return turn["content"] if "content" in turn else turn.get("value")


def _reasoning(turn: Mapping[str, Any]) -> str | None:
    reasoning = turn.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise TraceFormatError(f"reasoning_content is not text: found {type(reasoning).__name__}")
    return reasoning if reasoning and reasoning.strip() else None


def _system_message(system: Any, messages: list[Message]) -> list[Message]:
    if system is None or system == "":
        return []
    text = text_of(system, "the system prompt")
    present = [message["content"] for message in messages if message["role"] == "system"]
    if not text.strip() or text in present:
        return []
    if present:
        raise TraceFormatError("two system prompts: one among the turns, another beside them")
    return [{"role": "system", "content": text}]
