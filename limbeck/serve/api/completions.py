"""`/v1/completions`: texts that go on from prompts, and log-probs of prompts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, PlainValidator, WithJsonSchema

from limbeck.engine.jobs import Job
from limbeck.serve.api.logprobs import LogProbsText
from limbeck.serve.api.sampling import (
    MAX_LOG_PROBS,
    LogProbs,
    SamplingBody,
    check_count,
    make_jobs,
    refuse_contradictions,
)
from limbeck.serve.api.shapes import (
    Seconds,
    TextOrIds,
    Texts,
    described,
    ids_of,
    new_id,
    now,
    read,
    time_limit,
    written,
)
from limbeck.serve.api.streaming import stream
from limbeck.serve.api.texts import Piece, Tally, hidden_in, write
from limbeck.serve.errors import Invalid
from limbeck.serve.service import Service

DEFAULT_TOKENS = 16
SLICE = 64
"""Tokens whose log-probs are written in one go."""


def _alternatives(value: Any) -> int | None:
    """A number of alternatives; true is one of them."""
    if isinstance(value, bool):
        return 1 if value else None
    if not isinstance(value, int) or not 0 <= value <= MAX_LOG_PROBS:
        raise ValueError(f"give a number of alternatives, 0 to {MAX_LOG_PROBS}")
    return value


_NUMBER: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": MAX_LOG_PROBS}


class CompletionBody(SamplingBody):
    """A prompt or several, each as text or token ids."""

    prompt: Texts = Field([""])
    echo: bool = False
    add_special_tokens: bool = True
    logprobs: Annotated[
        int | None, PlainValidator(_alternatives), WithJsonSchema({"anyOf": [_NUMBER, {"type": "boolean"}]})
    ] = None
    """How many alternatives to report; null for no log-probs."""


def router(service: Service) -> APIRouter:
    """The endpoint over a service."""
    api = APIRouter(tags=["generation"])

    @api.post("/v1/completions", openapi_extra=described(CompletionBody))
    async def complete(request: Request, timeout: Seconds = None) -> Response:
        until = time_limit(service, timeout)
        body = await read(service, request, CompletionBody)
        refuse_contradictions(body)
        if not body.prompt:
            raise Invalid("prompt: an empty list; give one text or more.", "prompt")
        check_count(service, len(body.prompt) * body.n)  # before any of them is tokenised
        found = await ids_of(service, body.prompt, "prompt", special=body.add_special_tokens)
        prompts = [ids or _nothing(service) for ids in found]
        max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        log_probs = LogProbs(body.logprobs, body.logprobs if body.echo else None)
        jobs = await make_jobs(service, body, prompts, max_tokens, log_probs, until)
        echoes = [""] * len(prompts)
        if body.echo:
            echoes = await service.threads.run(body.size_bytes, lambda: _echoes(service, body.prompt, prompts))
        answer = _Answer(service, body, jobs, echoes, until)
        return await stream(service, answer.events()) if body.stream else await answer.whole()

    return api


class _Answer:
    """One request's choices."""

    def __init__(
        self, service: Service, body: CompletionBody, jobs: Sequence[Job], echoes: Sequence[str], until: float
    ) -> None:
        self._service, self._body, self._jobs, self._until = service, body, jobs, until
        self._echoes = [echo for echo in echoes for _ in range(body.n)]
        self._head = {"id": new_id("cmpl"), "object": "text_completion", "created": now(), "model": service.name}
        self._tally = Tally(sum(len(job.prompt) for job in jobs[:: body.n]), copies=body.n)
        follows = not body.echo
        self._log_probs = [LogProbsText(service.vocabulary, hidden_in(service, job), follows) for job in jobs]

    async def events(self) -> AsyncGenerator[str, None]:
        begun: set[int] = set()
        async for piece in self._pieces():
            await self._note(piece)
            text = piece.text if piece.index in begun else self._echoes[piece.index] + piece.text
            begun.add(piece.index)
            usage = self._tally.usage.model_dump() if self._body.has_running_usage else None
            yield self._answer([self._choice(piece.index, text, piece.finish)], usage)
        if self._body.has_usage:
            yield self._answer([], self._tally.usage.model_dump())

    async def whole(self) -> Response:
        texts = [[echo] for echo in self._echoes]
        finish: list[str | None] = [None] * len(texts)
        async for piece in self._pieces():
            await self._note(piece)
            texts[piece.index].append(piece.text)
            finish[piece.index] = piece.finish

        def joined() -> str:
            choices = [self._choice(i, "".join(parts), finish[i]) for i, parts in enumerate(texts)]
            return self._answer(choices, self._tally.usage.model_dump())

        return await written(self._service, 0, joined)

    def _pieces(self) -> Any:
        return write(self._service, self._jobs, self._body.stop, self._until, self._tally, goes_on=True)

    async def _note(self, piece: Piece) -> None:
        """Write the piece's log-probs."""
        if self._body.logprobs is None:
            return
        drawn = [*piece.prompt, *piece.drawn]
        for start in range(0, len(drawn), SLICE):
            self._log_probs[piece.index].add(drawn[start : start + SLICE], is_chat=False)
            if start:
                await asyncio.sleep(0)  # a prompt's may be many

    def _choice(self, index: int, text: str, finish: str | None) -> str:
        log_probs = "null" if self._body.logprobs is None else self._log_probs[index].take()
        rest = json.dumps({"index": index, "text": text, "finish_reason": finish}, ensure_ascii=False)
        return f'{rest[:-1]},"logprobs":{log_probs}}}'

    def _answer(self, choices: Sequence[str], usage: dict[str, Any] | None) -> str:
        end = "" if usage is None else f',"usage":{json.dumps(usage)}'
        return f'{json.dumps(self._head)[:-1]},"choices":[{",".join(choices)}]{end}}}'


def _nothing(service: Service) -> list[int]:
    """What stands for an empty prompt: the token that texts begin with, or the one they are set apart by."""
    tokenizer = service.tokenizer
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise Invalid("prompt: empty, and the tokenizer has no token to begin with.", "prompt")
    return [token]


def _echoes(service: Service, prompts: Sequence[TextOrIds], ids: Sequence[Sequence[int]]) -> list[str]:
    """The texts of prompts."""
    pairs = zip(prompts, ids, strict=True)
    return [prompt if isinstance(prompt, str) else service.vocabulary.shown(own) for prompt, own in pairs]
