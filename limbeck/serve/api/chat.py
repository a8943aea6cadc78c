"""`/v1/chat/completions`: replies to messages, thought and answer apart."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter
from pydantic import Field

from limbeck.engine.jobs import Drawn, Job
from limbeck.serve.api.logprobs import chat_log_probs
from limbeck.serve.api.sampling import MAX_LOG_PROBS, LogProbs, SamplingBody, make_jobs, refuse_unsupported
from limbeck.serve.api.shapes import Seconds, check_model, new_id, now
from limbeck.serve.api.streaming import stream
from limbeck.serve.api.texts import Tally, write
from limbeck.serve.errors import Invalid
from limbeck.serve.reasoning import Split, ThoughtSplitter
from limbeck.serve.service import Service
from limbeck.traces.chat import prompt_messages
from limbeck.traces.thought import KNOWN_MARKERS, Markers


class ChatBody(SamplingBody):
    """Messages, the user's last."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOG_PROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Of the model's template, say {"enable_thinking": false}."""
    separate_reasoning: bool = True
    """Give the thought as reasoning_content; false leaves it, with its markers, in content."""
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None


def router(service: Service) -> APIRouter:
    """The endpoint over a service."""
    api = APIRouter(tags=["generation"])

    @api.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, timeout: Seconds = None) -> Any:
        check_model(service, body.model)
        _refuse(body)
        text = render(service, body.messages, body.chat_template_kwargs or {})
        opened = next((pair for pair in KNOWN_MARKERS if text.rstrip().endswith(pair.start)), None)
        (prompt,) = await service.texts.encode([text], special=False)
        top = (body.top_logprobs or 0) if body.logprobs else None
        room = _room(service, body, len(prompt))
        jobs = await asyncio.to_thread(make_jobs, service, body, [prompt], room, LogProbs(top), opened is not None)
        answer = _Answer(service, body, jobs, opened, timeout)
        return await stream(service, answer.events()) if body.stream else await answer.whole()

    return api


class _Answer:
    """One request's choices."""

    def __init__(
        self, service: Service, body: ChatBody, jobs: Sequence[Job], opened: Markers | None, seconds: float | None
    ) -> None:
        self._service, self._body, self._jobs, self._seconds = service, body, jobs, seconds
        self._id, self._created = new_id("chatcmpl"), now()
        self._tally = Tally(len(jobs[0].prompt))
        known = KNOWN_MARKERS if body.separate_reasoning else ()
        self._splitters = [ThoughtSplitter(opened if known else None, known) for _ in jobs]

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        begun: set[int] = set()
        async for index, split, drawn, finish in self._pieces():
            delta: dict[str, Any] = {} if index in begun else {"role": "assistant", "content": ""}
            begun.add(index)
            if split.thought:
                delta["reasoning_content"] = split.thought
            if split.answer:
                delta["content"] = split.answer
            if delta or finish or self._body.logprobs:
                yield self._chunk([_choice(index, "delta", delta, self._log_probs(drawn), finish)])
        if self._body.has_usage:
            yield {**self._chunk([]), "usage": self._tally.usage.model_dump()}

    async def whole(self) -> dict[str, Any]:
        splits: list[list[Split]] = [[] for _ in self._jobs]
        drawn: list[list[Drawn]] = [[] for _ in self._jobs]
        finish: list[str | None] = [None] * len(self._jobs)
        async for index, split, tokens, end in self._pieces():
            splits[index].append(split)
            drawn[index] += tokens
            finish[index] = end
        choices = []
        for index, parts in enumerate(splits):
            thought = "".join(part.thought for part in parts) if self._splitters[index].has_thought else None
            message = {
                "role": "assistant",
                "content": "".join(part.answer for part in parts),
                "reasoning_content": thought,
            }
            choices.append(_choice(index, "message", message, self._log_probs(drawn[index]), finish[index]))
        return {**self._head("chat.completion"), "choices": choices, "usage": self._tally.usage.model_dump()}

    async def _pieces(self) -> AsyncGenerator[tuple[int, Split, Sequence[Drawn], str | None], None]:
        """Pieces with thought and answer apart."""
        pieces = write(self._service, self._jobs, self._body.stops, self._seconds, self._tally, goes_on=False)
        async for piece in pieces:
            splitter = self._splitters[piece.index]
            was_thought = splitter.in_thought
            split = splitter.add(piece.text)
            if was_thought or splitter.in_thought:
                self._tally.thought += len(piece.drawn)
            if piece.finish is not None:
                rest = splitter.finish()
                split = Split(split.thought + rest.thought, split.answer + rest.answer)
            yield piece.index, split, piece.drawn, piece.finish

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head("chat.completion.chunk"), "choices": choices}
        if self._body.has_running_usage:
            chunk["usage"] = self._tally.usage.model_dump()
        return chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._service.name}

    def _log_probs(self, drawn: Sequence[Drawn]) -> dict[str, Any] | None:
        return chat_log_probs(drawn, self._service.vocabulary.text_of) if self._body.logprobs else None


def _choice(index: int, name: str, content: Any, log_probs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": index, name: content, "logprobs": log_probs, "finish_reason": finish}


def _refuse(body: ChatBody) -> None:
    refuse_unsupported(body)
    if (body.tools and body.tool_choice != "none") or body.functions:
        raise Invalid("tools: not supported; ask for a form with response_format instead.", "tools")
    if body.top_logprobs is not None and not body.logprobs:
        raise Invalid("top_logprobs: only with logprobs.", "top_logprobs")


def _room(service: Service, body: ChatBody, prompt_tokens: int) -> int:
    """Most tokens of the reply."""
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if asked is not None:
        return asked
    left = service.decoder.max_tokens - prompt_tokens
    if left < 1:
        raise Invalid(f"messages of {prompt_tokens} tokens; the model reads {service.decoder.max_tokens}.", "messages")
    return min(left, service.limits.default_tokens)


def render(service: Service, messages: Sequence[Any], settings: dict[str, Any]) -> str:
    """The prompt by the model's chat template.

    Raises: Invalid where it has none or refuses the messages, and TraceFormatError for messages that are none.
    """
    tokenizer = service.tokenizer
    if not tokenizer.chat_template:
        raise Invalid("The model has no chat template; ask /v1/completions.", "messages")
    reserved = settings.keys() & inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    if reserved:
        raise Invalid(f"{', '.join(sorted(reserved))}: not a setting of the template.", "chat_template_kwargs")
    turns = [turn | {"role": "system"} if turn.get("role") == "developer" else turn for turn in messages]
    try:
        text = tokenizer.apply_chat_template(
            list(prompt_messages(turns)), tokenize=False, add_generation_prompt=True, **settings
        )
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
        raise Invalid(f"The chat template refuses the messages ({' '.join(str(error).split())[:200]}).") from error
    return str(text)
