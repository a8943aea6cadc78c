"""Lists of chat turns, from whatever keys and role names they use, to prompt messages and one reply."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from limbeck.errors import TraceFormatError
from limbeck.traces.calls import calls_as_text, calls_in
from limbeck.traces.content import Content, are_parts, as_list, content_of, present, text_of

Message = dict[str, Any]
"""`role` and `content`; perhaps `reasoning_content`, `tool_calls`, `name` and `tool_call_id`."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
}
"""Role names of the common formats and what limbeck calls them; case is no matter."""
TOOL_ROLES = ("tool", "function", "observation", "ipython", "tool_response")
"""Roles of turns that hold what a tool answered."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles of turns in which the assistant calls a tool."""
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning", "thought")
"""Keys of a turn that hold its thought."""
CONTENT_KEYS = ("content", "value", "parts", "text")

JOINED = "consecutive assistant turns at the end are joined"
EARLIER = "earlier assistant turns are read as prompt and not trained"
UNTRAINED = "the last assistant turn is marked as not to train (weight 0 or train false); the one before it is taken"
ALL_UNTRAINED = "all assistant turns are marked as not to train (weight 0 or train false), so it is left out"


class Reply(NamedTuple):
    """The last assistant turn that is to be trained."""

    text: str | None
    """None when the turn has no content, as when a server cut the reply inside its thought."""
    reasoning: str | None
    """The thought, where it has its own field; else None."""
    calls: tuple[Mapping[str, Any], ...] = ()
    """The tools that it calls."""


class Chat(NamedTuple):
    """A chat split at its reply."""

    messages: tuple[Message, ...]
    reply: Reply | None
    """None when no assistant turn is to be trained."""
    notes: tuple[str, ...] = ()
    """What was joined or passed over."""
    weights: tuple[float, ...] = ()
    """What each assistant turn weighs as it is marked, the reply last."""


class _Turn(NamedTuple):
    role: str
    text: str | None
    thought: str | None
    weight: float
    calls: tuple[Mapping[str, Any], ...] = ()
    more: Mapping[str, str] = {}
    """`name` and `tool_call_id` of a tool's answer."""


def _last_trained(turns: list[_Turn]) -> int | None:
    """The place of the assistant's last turn that is trained."""
    return max((i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.weight), default=None)


def _check_last(turns: list[_Turn]) -> None:
    if turns[-1].role == "assistant":
        return
    if not any(turn.role == "assistant" for turn in turns):
        raise TraceFormatError("no assistant turn")
    raise TraceFormatError(f"last turn not from the assistant: it is from {turns[-1].role!r}")


def split_chat(turns: Any, system: Any = None) -> Chat:
    """Prompt messages and the reply to them.

    Args:
        turns: list of mappings with `role` and `content`, or `from` and `value`, or such a list as JSON text; the
            assistant's last.
        system: a system prompt kept apart from the turns; None or blank when there is none.

    Raises: TraceFormatError for whatever is not such a chat.
    """
    read, notes = _with_one_reply(_with_calls([_read(turn) for turn in _turn_list(turns)]))
    _check_last(read)
    _check_answers(read)
    last = _last_trained(read)
    if last is None:
        return Chat((), None, (*notes, ALL_UNTRAINED))
    if last < len(read) - 1:
        notes.append(UNTRAINED)
    reply = read[last]
    messages = _prompt(read[:last], system)
    if any(message["role"] == "assistant" for message in messages):
        notes.append(EARLIER)
    if reply.text is None and reply.thought is None:
        raise TraceFormatError("no content: the last assistant turn is null")
    weights = tuple(turn.weight for turn in read[: last + 1] if turn.role == "assistant")
    return Chat(messages, Reply(reply.text, reply.thought, reply.calls), tuple(notes), weights)


def _check_answers(turns: Sequence[_Turn]) -> None:
    """Tools answer the assistant, whose text may hold the call."""
    for before, turn in zip([None, *turns], turns, strict=False):
        if turn.role == "tool" and not (before and before.role in ("assistant", "tool")):
            raise TraceFormatError("tool answer without a call: the turn before it is not the assistant's")


def prompt_messages(turns: Any, system: Any = None) -> tuple[Message, ...]:
    """Turns as messages with `role` and `content`, a separate system prompt in front of them.

    Raises: TraceFormatError when no turn is from the user, the last one is the assistant's, or it is blank.
    """
    read = _with_calls([_read(turn) for turn in _turn_list(turns, allow_empty=True)])
    _check_answers(read)
    return _prompt(read, system)


def is_open(turns: Any) -> bool:
    """Whether a list of turns ends with the user."""
    turns = as_list(turns)
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], Mapping):
        return False
    return ROLES.get(str(_role_name(turns[-1])).lower()) == "user"


def without_reply(turns: Any) -> Any:
    """The turns up to the last one from the user."""
    turns = as_list(turns)
    if not isinstance(turns, list):
        return turns
    ends = [place for place in range(1, len(turns) + 1) if is_open(turns[:place])]
    return turns[: ends[-1]] if ends else turns


def user_turns(prompt: Any) -> list[Any]:
    """A prompt, a string, typed parts or a list of turns, as turns."""
    found = as_list(prompt)
    if isinstance(found, list | tuple) and not are_parts(found) and all(isinstance(turn, Mapping) for turn in found):
        return list(found)
    return [{"role": "user", "content": prompt}]


def _prompt(turns: Sequence[_Turn], system: Any) -> tuple[Message, ...]:
    messages = [_message(turn) for turn in turns]
    if not any(message["role"] == "user" for message in messages):
        raise TraceFormatError("no user turn")
    if messages[-1]["role"] not in ("user", "tool"):
        raise TraceFormatError(f"prompt does not end with the user: it ends with {messages[-1]['role']!r}")
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        raise TraceFormatError("empty prompt")
    return (*_system_message(system, messages), *messages)


def _turn_list(turns: Any, allow_empty: bool = False) -> list[Mapping[str, Any]]:
    turns = as_list(turns)
    if not isinstance(turns, list | tuple):
        raise TraceFormatError(f"turns are not a list: found {type(turns).__name__}")
    if not turns and not allow_empty:
        raise TraceFormatError("no turns: the list of turns is empty")
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise TraceFormatError(f"turn is not an object: found {type(turn).__name__}")
    return list(turns)


def _read(turn: Mapping[str, Any]) -> _Turn:
    turn = present(turn)
    role = _role(turn)
    value = next((turn[key] for key in CONTENT_KEYS if key in turn), None)
    if role == "tool":
        more: dict[str, str] = {key: str(turn[key]) for key in ("name", "tool_call_id") if key in turn}
        return _Turn(role, _answered(value), None, 0.0, more=more)
    if str(_role_name(turn)).lower() in CALL_ROLES:
        return _Turn(role, None, None, _weight(turn), calls_as_text(text_of(value, "a turn that calls a tool")))
    content = Content(None) if value is None else content_of(value, f"a turn of the {role}")
    calls = calls_in(turn)
    if calls and role != "assistant":
        raise TraceFormatError(f"tool calls in a turn of the {role}: only the assistant calls tools")
    text = "" if calls and content.text is None else content.text
    return _Turn(role, text, _thought(turn, content), _weight(turn), calls)


def _answered(value: Any) -> str:
    """What a tool answered, as text; an object is JSON."""
    if isinstance(value, Mapping) or (isinstance(value, list | tuple) and not are_parts(value)):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else text_of(value, "an answer of a tool")


def _with_calls(turns: list[_Turn]) -> list[_Turn]:
    """Turns that only call a tool belong to the assistant's turn before them."""
    found: list[_Turn] = []
    for turn in turns:
        if turn.calls and turn.text is None and found and found[-1].role == "assistant":
            found[-1] = found[-1]._replace(text=found[-1].text or "", calls=(*found[-1].calls, *turn.calls))
        else:
            found.append(turn._replace(text="") if turn.calls and turn.text is None else turn)
    return found


def _joined(texts: Iterable[str | None]) -> str | None:
    known = [text for text in texts if text is not None]
    return "\n\n".join(known) if known else None


def _with_one_reply(turns: list[_Turn]) -> tuple[list[_Turn], list[str]]:
    """The assistant turns at the end as one, and whether there were several. Others are left to the template."""
    start = len(turns)
    while start and turns[start - 1].role == "assistant":
        start -= 1
    replies = turns[start:]
    if len(replies) < 2:
        return turns, []
    if len({turn.weight for turn in replies}) > 1:
        raise TraceFormatError("consecutive turns: one of the assistant's is to be trained and another is not")
    text, thought = _joined(turn.text for turn in replies), _joined(turn.thought for turn in replies) or None
    calls = tuple(call for turn in replies for call in turn.calls)
    return [*turns[:start], replies[0]._replace(text=text, thought=thought, calls=calls)], [JOINED]


def _message(turn: _Turn) -> Message:
    if turn.text is None:
        raise TraceFormatError(f"no content: a turn of the {turn.role} is null")
    message: Message = {"role": turn.role, "content": turn.text, **turn.more}
    if turn.calls:
        message["tool_calls"] = list(turn.calls)
    if turn.thought is not None:
        # Whether an earlier thought is shown again is the template's decision.
        message["reasoning_content"] = turn.thought
    return message


def _role_name(turn: Mapping[str, Any]) -> Any:
    return next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)


def _role(turn: Mapping[str, Any]) -> str:
    name = _role_name(turn)
    if isinstance(name, str) and name.lower() in ROLES:
        return ROLES[name.lower()]
    if isinstance(name, str) and name.lower() in (*TOOL_ROLES, *CALL_ROLES):
        return "tool" if name.lower() in TOOL_ROLES else "assistant"
    keys = ", ".join(map(str, turn))[:80] or "none"
    found = f"{str(name)[:40]!r}" if name is not None else f"none among the keys of the turn ({keys})"
    raise TraceFormatError(f"unknown role: {found}, accepted are {', '.join((*ROLES, *TOOL_ROLES, *CALL_ROLES))}")


def _thought(turn: Mapping[str, Any], content: Content) -> str | None:
    found = [] if content.thought is None else [content.thought]
    for key in filter(turn.__contains__, THOUGHT_KEYS):
        if not isinstance(turn[key], str):
            raise TraceFormatError(f"{key} is not text: found {type(turn[key]).__name__}")
        if turn[key].strip() and turn[key] not in found:
            found.append(turn[key])
    if len(found) > 1:
        raise TraceFormatError("two thoughts: a turn holds different ones under several keys")
    return found[0] if found and found[0].strip() else None


def _weight(turn: Mapping[str, Any]) -> float:
    """What the turn weighs as it is marked: `train` is a switch, `weight` a number."""
    train, weight = turn.get("train", 1), turn.get("weight", 1)
    if train not in (0, 1):
        raise TraceFormatError(f"train of a turn is {str(train)[:40]!r}, accepted are 0 and 1")
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise TraceFormatError(f"weight of a turn is {str(weight)[:40]!r}, accepted are numbers of at least 0")
    return float(weight) if train else 0.0


def _system_message(system: Any, messages: list[Message]) -> list[Message]:
    if system is None or system == "":
        return []
    text = text_of(system, "the system prompt")
    given = [message["content"] for message in messages if message["role"] == "system"]
    if not text.strip() or text in given:
        return []
    if given:
        raise TraceFormatError("two system prompts: one among the turns, another beside them")
    return [{"role": "system", "content": text}]
