"""`/v1/completions`: texts that go on from prompts, and log-probs of prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from limbeck.engine.jobs import Job
from limbeck.serve.api.logprobs import CompletionLogProbs
from limbeck.serve.api.sampling import MAX_LOG_PROBS, LogProbs, SamplingBody, make_jobs, refuse_unsupported
from limbeck.serve.api.shapes import Ids, Seconds, TextOrIds, check_model, ids_of, new_id, now
from limbeck.serve.api.streaming import stream
from limbeck.serve.api.texts import Piece, Tally, write
from limbeck.serve.errors import Invalid
from limbeck.serve.service import Service

DEFAULT_TOKENS = 16


class CompletionBody(SamplingBody):
    """A prompt or several, each as text or token ids."""

    prompt: str | list[str] | Ids | list[Ids] = ""
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOG_PROBS)] | bool | None = None
    suffix: str | None = None

    @property
    def top(self) -> int | None:
        """How many alternatives to report; None for no log-probs."""
        if isinstance(self.logprobs, bool):
            return 1 if self.logprobs else None
        return self.logprobs


def router(service: Service) -> APIRouter:
    """The endpoint over a service."""
    api = APIRouter(tags=["generation"])

    @api.post("/v1/completions", response_model=None)
    async def complete(body: CompletionBody, timeout: Seconds = None) -> Any:
        check_model(service, body.model)
        refuse_unsupported(body)
        if body.suffix:
            raise Invalid("suffix: not supported; leave it out.", "suffix")
        texts = _listed(body.prompt)
        prompts = [ids or _nothing(service) for ids in await ids_of(service, texts, "prompt", special=True)]
        max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        log_probs = LogProbs(body.top, body.top if body.echo else None)
        jobs = await asyncio.to_thread(make_jobs, service, body, prompts, max_tokens, log_probs)
        echoes = [_echo(service, body, text, ids) for text, ids in zip(texts, prompts, strict=True)]
        answer = _Answer(service, body, jobs, echoes, timeout)
        return await stream(service, answer.events()) if body.stream else await answer.whole()

    return api


class _Answer:
    """One request's choices."""

    def __init__(
        self, service: Service, body: CompletionBody, jobs: Sequence[Job], echoes: Sequence[str], seconds: float | None
    ) -> None:
        self._service, self._body, self._jobs, self._seconds = service, body, jobs, seconds
        self._echoes = [echo for echo in echoes for _ in range(body.n or 1)]
        self._head = {"id": new_id("cmpl"), "object": "text_completion", "created": now(), "model": service.name}
        self._tally = Tally(sum(len(job.prompt) for job in jobs[:: body.n or 1]))
        self._log_probs = [CompletionLogProbs(service.vocabulary.text_of) for _ in jobs]

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        begun: set[int] = set()
        async for piece in self._pieces():
            event = {**self._head, "choices": [self._choice(piece, is_first=piece.index not in begun)]}
            begun.add(piece.index)
            if self._body.has_running_usage:
                event["usage"] = self._tally.usage.model_dump()
            yield event
        if self._body.has_usage:
            yield {**self._head, "choices": [], "usage": self._tally.usage.model_dump()}

    async def whole(self) -> dict[str, Any]:
        choices: dict[int, dict[str, Any]] = {}
        async for piece in self._pieces():
            choice = self._choice(piece, is_first=piece.index not in choices)
            choices[piece.index] = _joined(choices[piece.index], choice) if piece.index in choices else choice
        ordered = [choices[index] for index in sorted(choices)]
        return {**self._head, "choices": ordered, "usage": self._tally.usage.model_dump()}

    def _pieces(self) -> Any:
        return write(self._service, self._jobs, self._body.stops, self._seconds, self._tally, goes_on=True)

    def _choice(self, piece: Piece, is_first: bool) -> dict[str, Any]:
        text = self._echoes[piece.index] + piece.text if is_first else piece.text
        log_probs = None
        if self._body.top is not None:
            log_probs = self._log_probs[piece.index].add([*piece.prompt, *piece.drawn])
        return {"index": piece.index, "text": text, "logprobs": log_probs, "finish_reason": piece.finish}


def _joined(choice: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    choice["text"] += more["text"]
    choice["finish_reason"] = more["finish_reason"]
    for name, values in (more["logprobs"] or {}).items():
        choice["logprobs"][name] += values
    return choice


def _listed(prompt: str | list[str] | Ids | list[Ids]) -> list[TextOrIds]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise Invalid("prompt: an empty list; give one text or more.", "prompt")
    return [*prompt]


def _nothing(service: Service) -> list[int]:
    """What stands for an empty prompt: the token that texts begin with, or the one they are set apart by."""
    tokenizer = service.tokenizer
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise Invalid("prompt: empty, and the tokenizer has no token to begin with.", "prompt")
    return [token]


def _echo(service: Service, body: CompletionBody, prompt: TextOrIds, ids: Sequence[int]) -> str:
    if not body.echo:
        return ""
    return prompt if isinstance(prompt, str) else service.vocabulary.shown(ids)
