"""`/v1/responses`, the basic form: texts in, a text out. A chat in other words; nothing is stored."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from limbeck.serve.api.chat import ChatBody, Reply
from limbeck.serve.api.messages import MOST_MESSAGES
from limbeck.serve.api.shapes import Body, Positive, Seconds, Shape, described, new_id, now, read, time_limit, written
from limbeck.serve.api.streaming import stream
from limbeck.serve.errors import Invalid
from limbeck.serve.service import Service

UNSUPPORTED = ("tools", "previous_response_id", "conversation", "prompt", "background", "include", "max_tool_calls")
"""Fields of this API alone that would change the answer."""


class TextFormat(Shape):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "schema"
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextSettings(Shape):
    """Where this API has the form."""

    format: TextFormat | None = None


class ResponsesBody(Body):
    """A text, or turns."""

    input: Any
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    text: TextSettings = Field(default_factory=TextSettings)
    stream: bool = False


def router(service: Service) -> APIRouter:
    """The endpoint over a service."""
    api = APIRouter(tags=["generation"])

    @api.post("/v1/responses", openapi_extra=described(ResponsesBody))
    async def respond(request: Request, timeout: Seconds = None) -> Response:
        until = time_limit(service, timeout)
        body = await read(service, request, ResponsesBody)
        reply = await Reply.begun(service, await service.threads.run(body.size_bytes, lambda: _chat(body)), until)
        answer = _Answer(service, body, reply)
        return await stream(service, answer.events(), has_names=True) if body.stream else await answer.whole()

    return api


def _chat(body: ResponsesBody) -> ChatBody:
    """The same as a chat. Raises: Invalid."""
    for name in UNSUPPORTED:
        if (body.model_extra or {}).get(name):
            raise Invalid(f"{name}: not supported here; send the whole conversation as input.", name)
    first = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    form = body.text.format
    schema = None if form is None or form.schema_ is None else {"schema": form.schema_}
    asked = {"type": "text" if form is None else form.type, "json_schema": schema}
    chat = ChatBody.model_validate(
        {
            "messages": [*first, *_turns(body.input)],
            "max_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "response_format": asked,
        }
    )
    chat._size = body.size_bytes
    return chat


def _turns(given: Any) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Invalid("input: give a text, or a list of turns.", "input")
    if len(turns) > MOST_MESSAGES:
        raise Invalid(f"input: {len(turns)} turns; the server's limit is {MOST_MESSAGES}.", "input")
    for place, turn in enumerate(turns):
        if turn.get("type", "message") != "message":
            raise Invalid(f"input.{place}: of type {str(turn['type'])[:40]!r}; turns are messages.", "input")
    return turns


class _Answer:
    """OpenAI's shape of it."""

    def __init__(self, service: Service, body: ResponsesBody, reply: Reply) -> None:
        self._service, self._body, self._reply = service, body, reply
        self._id, self._item, self._created = new_id("resp"), new_id("msg"), now()

    async def whole(self) -> Response:
        text, finish = "", None
        async for part in self._reply.parts():
            text, finish = text + part.answer, part.finish
        return await written(self._service, 0, lambda: json.dumps(self._response(text, finish), ensure_ascii=False))

    async def events(self) -> AsyncGenerator[str, None]:
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        count, text, finish = 0, "", None

        def event(kind: str, **fields: Any) -> str:
            nonlocal count
            count += 1
            return json.dumps({"type": kind, "sequence_number": count - 1, **fields}, ensure_ascii=False)

        yield event("response.created", response=self._response(None, None))
        yield event("response.output_item.added", output_index=0, item=self._message("", "in_progress"))
        yield event("response.content_part.added", **place, part=_part(""))
        async for part in self._reply.parts():
            text, finish = text + part.answer, part.finish
            if part.answer:
                yield event("response.output_text.delta", **place, delta=part.answer, logprobs=[])
        yield event("response.output_text.done", **place, text=text, logprobs=[])
        yield event("response.content_part.done", **place, part=_part(text))
        yield event("response.output_item.done", output_index=0, item=self._message(text, "completed"))
        last = self._response(text, finish)
        yield event(f"response.{last['status']}", response=last)

    def _response(self, text: str | None, finish: str | None) -> dict[str, Any]:
        """`text`: None while it is not finished."""
        is_cut = finish == "length"
        usage = self._reply.tally.usage
        details = usage.completion_tokens_details or {}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if text is None else "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "error": None,
            "instructions": self._body.instructions,
            "max_output_tokens": self._body.max_output_tokens,
            "metadata": {},
            "model": self._service.name,
            "output": [] if text is None else [self._message(text, "completed")],
            "parallel_tool_calls": True,
            "temperature": self._body.temperature,
            "top_p": self._body.top_p,
            "tool_choice": "auto",
            "tools": [],
            "usage": None
            if text is None
            else {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {**(usage.prompt_tokens_details or {}), "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens", 0)},
                "total_tokens": usage.total_tokens,
            },
        }

    def _message(self, text: str, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [_part(text)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
