"""Messages of a chat become the tokens of its prompt, by the model's own template.

What stands in a message is text, whatever it reads like: a special token written there is broken up before the template
is rendered and tokenised in parts, so that no content can end its turn and begin another.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jinja2
from pydantic import Field

from limbeck.serve.api.shapes import Body
from limbeck.serve.api.tools import ToolForm, form_of, tool_schemas
from limbeck.serve.errors import Invalid, too_long
from limbeck.serve.service import Service
from limbeck.traces.thought import KNOWN_MARKERS, Markers

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Of Unicode's noncharacters: one that no message has marks where a special token was broken up."""
MOST_MESSAGES = 10_000


class ChatPrompt(Body):
    """Messages and what the template makes of them."""

    messages: Annotated[list[Any], Field(max_length=MOST_MESSAGES)] = Field(default_factory=list)
    add_generation_prompt: bool = True
    """Begin the assistant's turn behind the messages."""
    continue_final_message: bool = False
    """Go on with the last message, which is the assistant's; with add_generation_prompt false."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Of the model's template, say {"enable_thinking": false}."""
    reasoning_effort: str | None = None
    """The same, under OpenAI's name."""
    tools: Annotated[list[Any], Field(max_length=1000)] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True


class Prompt(NamedTuple):
    """The tokens that a chat is answered to."""

    ids: list[int]
    opened: Markers | None
    """Markers of a thought that the template has opened."""
    tools: ToolForm | None
    """How the reply writes calls of tools, where it may."""


async def prompt_ids(service: Service, body: ChatPrompt) -> Prompt:
    """The prompt of a chat.

    Raises: Invalid for messages or tools that are none, or that the template has no place for.
    """
    return await service.threads.run(body.size_bytes, lambda: _prompt_ids(service, body))


def _prompt_ids(service: Service, body: ChatPrompt) -> Prompt:
    if not body.messages:
        raise Invalid("messages: give one or more.", "messages")
    messages = [_message(turn, f"messages.{place}") for place, turn in enumerate(body.messages)]
    template = _template(service, bool(body.tools))
    tools = _tools(service, body, template)
    _check_history(messages, template)
    if body.continue_final_message and (messages[-1]["role"] != "assistant" or body.add_generation_prompt):
        raise Invalid(
            "continue_final_message: needs a last message of the assistant, and add_generation_prompt false.",
            "continue_final_message",
        )
    guard = _guard(messages)
    text = _rendered(service, body, _broken_up(messages, service.vocabulary.controls, guard), tools)
    limit = service.decoder.max_tokens
    if len(text) > service.vocabulary.longest * limit:  # not even worth counting
        raise too_long(len(text) // service.vocabulary.longest, 0, limit, "messages")
    opened = next((pair for pair in KNOWN_MARKERS if text.rstrip().endswith(pair.start)), None)
    return Prompt(service.texts.encode_now(text.split(guard)), opened, form_of(template) if tools else None)


def _message(turn: Any, place: str) -> dict[str, Any]:
    """A message with the fields that templates read. Raises: Invalid, naming the place."""
    if not isinstance(turn, Mapping):
        raise Invalid(f"{place}: give an object with role and content.", "messages")
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Invalid(f"{place}.role: unknown role {str(role)[:40]!r}; accepted are {', '.join(ROLES)}.", "messages")
    message: dict[str, Any] = {"role": ROLES[role], "content": _content(turn, role, f"{place}.content")}
    reasoning = turn.get("reasoning_content") or turn.get("reasoning")
    if isinstance(reasoning, str) and reasoning.strip():
        message["reasoning_content"] = reasoning
    if turn.get("tool_calls"):
        message["tool_calls"] = _calls(turn["tool_calls"], role, f"{place}.tool_calls")
    return message | {name: turn[name] for name in ("tool_call_id", "name") if isinstance(turn.get(name), str)}


def _content(turn: Mapping[str, Any], role: Any, place: str) -> str:
    content = turn.get("content")
    if content is None and role == "assistant":
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Invalid(f"{place}: content is a text, or a list of parts of type text.", "messages")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise Invalid(f"{place}: a part of type {str(kind)[:40]!r}; this model reads text alone.", "messages")
    return "".join(part["text"] for part in content)


def _calls(calls: Any, role: str, place: str) -> list[dict[str, Any]]:
    if role != "assistant" or not isinstance(calls, list):
        raise Invalid(f"{place}: a list, in a message of the assistant.", "messages")
    return [_call(call, f"{place}.{number}") for number, call in enumerate(calls)]


def _call(call: Any, place: str) -> dict[str, Any]:
    """A call as templates read it, with its arguments as an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Invalid(f"{place}.function: give an object with name and arguments.", "messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise Invalid(f"{place}.function.arguments: no valid JSON.", "messages") from None
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _template(service: Service, with_tools: bool) -> str:
    """The model's template, or the one of several that is for tools. Raises: Invalid where it has none."""
    tokenizer = service.tokenizer
    if not tokenizer.chat_template:
        raise Invalid("The model has no chat template; ask /v1/completions.", "messages")
    return str(tokenizer.get_chat_template(None, [{}] if with_tools else None))


def _tools(service: Service, body: ChatPrompt, template: str) -> list[dict[str, Any]] | None:
    if body.tool_choice not in (None, "auto", "none"):
        raise Invalid("tool_choice: only auto and none; a form (response_format) binds a reply.", "tool_choice")
    if not body.tools or body.tool_choice == "none":
        return None
    tools = tool_schemas(body.tools)
    if form_of(template) is None:
        raise Invalid(f"tools: the template of {service.name} has no place for tools.", "tools")
    if not body.parallel_tool_calls:
        raise Invalid("parallel_tool_calls: false is not supported; leave it out.", "parallel_tool_calls")
    return tools


def _check_history(messages: Sequence[dict[str, Any]], template: str) -> None:
    for place, message in enumerate(messages):
        if "tool_calls" in message and "tool_calls" not in template:
            raise Invalid(f"messages.{place}.tool_calls: the model's template has no place for tools.", "messages")
        if message["role"] == "tool" and not any(word in template for word in ("tool", "ipython")):
            raise Invalid(f"messages.{place}: the model's template has no role tool.", "messages")


def _guard(messages: Sequence[dict[str, Any]]) -> str:
    text = json.dumps(messages, ensure_ascii=False)
    for guard in GUARDS:
        if guard not in text:
            return guard
    raise Invalid("messages: all noncharacters of Unicode in one chat are no text.", "messages")


def _broken_up(value: Any, controls: Sequence[str], guard: str) -> Any:
    """The same with a mark within each special token that a text has."""
    if isinstance(value, str):
        for control in reversed(controls):  # the longest first, since it may hold another
            if control in value:
                value = value.replace(control, control[0] + guard + control[1:])
        return value
    if isinstance(value, dict):
        return {name: _broken_up(one, controls, guard) for name, one in value.items()}
    return [_broken_up(one, controls, guard) for one in value] if isinstance(value, list) else value


def _rendered(
    service: Service, body: ChatPrompt, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> str:
    tokenizer, settings = service.tokenizer, dict(body.chat_template_kwargs)
    reserved = settings.keys() & (inspect.signature(tokenizer.apply_chat_template).parameters.keys() | {"messages"})
    if reserved:
        raise Invalid(f"{', '.join(sorted(reserved))}: not a setting of the template.", "chat_template_kwargs")
    if body.reasoning_effort is not None:
        settings["reasoning_effort"] = body.reasoning_effort
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            **settings,
        )
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())[:200]
        raise Invalid(f"messages: the chat template refuses them ({told}).", "messages") from error
    return str(text)
