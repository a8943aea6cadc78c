"""`/v1/chat/completions`: replies to messages; thought, answer and calls of tools apart."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Request, Response
from pydantic import Field

from limbeck.engine.jobs import Job
from limbeck.serve.api.logprobs import LogProbsText
from limbeck.serve.api.messages import ChatPrompt, Prompt, prompt_ids
from limbeck.serve.api.sampling import MAX_LOG_PROBS, LogProbs, SamplingBody, make_jobs, refuse_contradictions
from limbeck.serve.api.shapes import Count, Seconds, described, new_id, now, read, time_limit, written
from limbeck.serve.api.streaming import stream
from limbeck.serve.api.texts import Piece, Tally, hidden_in, write
from limbeck.serve.api.tools import Call, ToolSplitter
from limbeck.serve.errors import Invalid, too_long
from limbeck.serve.reasoning import Split, ThoughtSplitter
from limbeck.serve.service import Service
from limbeck.traces.thought import KNOWN_MARKERS


class ChatBody(ChatPrompt, SamplingBody):
    """Messages, and how the reply is written."""

    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOG_PROBS)] | None = None
    separate_reasoning: bool = True
    """Give the thought as reasoning_content; false leaves it, with its markers, in content."""


class Part(NamedTuple):
    """What a step brought one reply."""

    number: int
    """Of the reply."""
    thought: str
    answer: str
    calls: Sequence[tuple[int, Call]]
    """With their place among the reply's calls."""
    finish: str | None


def router(service: Service) -> APIRouter:
    """The endpoint over a service."""
    api = APIRouter(tags=["generation"])

    @api.post("/v1/chat/completions", openapi_extra=described(ChatBody))
    async def chat(request: Request, timeout: Seconds = None) -> Response:
        until = time_limit(service, timeout)
        reply = await Reply.begun(service, await read(service, request, ChatBody), until)
        answer = _Answer(service, reply)
        return await stream(service, answer.events()) if reply.body.stream else await answer.whole()

    return api


class Reply:
    """The replies to one chat, as parts that come."""

    def __init__(self, service: Service, body: ChatBody, prompt: Prompt, jobs: Sequence[Job], until: float) -> None:
        self.service, self.body, self.jobs = service, body, jobs
        self.tally = Tally(len(prompt.ids), copies=len(jobs))
        self._until = until
        known = KNOWN_MARKERS if body.separate_reasoning else ()
        opened = prompt.opened if known else None
        self._thoughts = [ThoughtSplitter(opened, known) for _ in jobs]
        self._tools = [None if prompt.tools is None else ToolSplitter(prompt.tools) for _ in jobs]
        self._markers = () if prompt.tools is None else (*prompt.tools.starts, *prompt.tools.ends)
        self.log_probs = [LogProbsText(service.vocabulary, self._hidden(job), follows=False) for job in jobs]

    @classmethod
    async def begun(cls, service: Service, body: ChatBody, until: float) -> Reply:
        """Checked, so that the engine takes it. Raises: Invalid, Refusal, LimbeckError."""
        refuse_contradictions(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise Invalid("top_logprobs: only with logprobs.", "top_logprobs")
        prompt = await prompt_ids(service, body)
        top = (body.top_logprobs or 0) if body.logprobs else None
        room = _room(service, body, len(prompt.ids))
        opened = prompt.opened is not None
        jobs = await make_jobs(service, body, [prompt.ids], room, LogProbs(top), until, opened)
        return cls(service, body, prompt, jobs, until)

    def has_thought(self, index: int) -> bool:
        """Whether a reply had a thought so far."""
        return self._thoughts[index].has_thought

    async def parts(self) -> AsyncGenerator[Part, None]:
        """Thought, answer and calls as they come; log-probs are written along."""
        shown = self.service.vocabulary.ids_within(self._markers)
        async for piece in write(
            self.service, self.jobs, self.body.stop, self._until, self.tally, goes_on=False, shown=shown
        ):
            if self.body.logprobs:
                self.log_probs[piece.index].add(piece.drawn, is_chat=True)
            yield self._part(piece)

    def _part(self, piece: Piece) -> Part:
        thoughts, tools = self._thoughts[piece.index], self._tools[piece.index]
        was_thought = thoughts.in_thought
        split = thoughts.add(piece.text)
        if was_thought or thoughts.in_thought:
            self.tally.thought += len(piece.drawn)
        if piece.finish is not None:
            rest = thoughts.finish()
            split = Split(split.thought + rest.thought, split.answer + rest.answer)
        if tools is None:
            return Part(piece.index, split.thought, split.answer, (), piece.finish)
        first = tools.count
        answer, calls = tools.add(split.answer)
        if piece.finish is not None:
            more, others = tools.finish()
            answer, calls = answer + more, calls + others
        finish = "tool_calls" if piece.finish == "stop" and tools.count else piece.finish
        return Part(piece.index, split.thought, answer, list(enumerate(calls, first)), finish)

    def _hidden(self, job: Job) -> frozenset[int]:
        return hidden_in(self.service, job) - self.service.vocabulary.ids_within(self._markers)


class _Answer:
    """OpenAI's shape of it."""

    def __init__(self, service: Service, reply: Reply) -> None:
        self._reply, self._body = reply, reply.body
        self._head = {"id": new_id("chatcmpl"), "created": now(), "model": service.name}

    async def events(self) -> AsyncGenerator[str, None]:
        begun: set[int] = set()
        async for part in self._reply.parts():
            delta = ({} if part.number in begun else {"role": "assistant", "content": ""}) | _delta(part)
            begun.add(part.number)
            if delta or part.finish or self._body.logprobs:
                usage = self._reply.tally.usage.model_dump() if self._body.has_running_usage else None
                yield self._answer("chat.completion.chunk", [self._choice(part, "delta", delta)], usage)
        if self._body.has_usage:
            yield self._answer("chat.completion.chunk", [], self._reply.tally.usage.model_dump())

    async def whole(self) -> Response:
        parts: list[list[Part]] = [[] for _ in self._reply.jobs]
        async for part in self._reply.parts():
            parts[part.number].append(part)

        def joined() -> str:
            choices = [self._choice(own[-1], "message", self._message(own)) for own in parts]
            return self._answer("chat.completion", choices, self._reply.tally.usage.model_dump())

        return await written(self._reply.service, 0, joined)

    def _message(self, parts: Sequence[Part]) -> dict[str, Any]:
        calls = [_called(call) for part in parts for _, call in part.calls]
        content = "".join(part.answer for part in parts)
        thought = "".join(part.thought for part in parts) if self._reply.has_thought(parts[0].number) else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "reasoning_content": thought}
        return message | ({"tool_calls": calls, "content": content or None} if calls else {})

    def _choice(self, part: Part, name: str, content: dict[str, Any]) -> str:
        log_probs = self._reply.log_probs[part.number].take() if self._body.logprobs else "null"
        rest = {"index": part.number, name: content, "finish_reason": part.finish}
        return f'{json.dumps(rest, ensure_ascii=False)[:-1]},"logprobs":{log_probs}}}'

    def _answer(self, kind: str, choices: Sequence[str], usage: dict[str, Any] | None) -> str:
        head = json.dumps({**self._head, "object": kind})
        end = "" if usage is None else f',"usage":{json.dumps(usage)}'
        return f'{head[:-1]},"choices":[{",".join(choices)}]{end}}}'


def _delta(part: Part) -> dict[str, Any]:
    """What a part adds to a message."""
    calls = [{"index": place, **_called(call)} for place, call in part.calls]
    fields = {"reasoning_content": part.thought, "content": part.answer, "tool_calls": calls}
    return {name: value for name, value in fields.items() if value}


def _called(call: Call) -> dict[str, Any]:
    return {"id": new_id("call"), "type": "function", "function": call._asdict()}


def _room(service: Service, body: ChatBody, prompt_tokens: int) -> int:
    """Most tokens of the reply."""
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if asked is not None:
        return asked
    left = service.decoder.max_tokens - prompt_tokens
    if left < 1:
        raise too_long(prompt_tokens, 0, service.decoder.max_tokens, "messages")
    return min(left, service.limits.default_tokens)
