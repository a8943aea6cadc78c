"""`/v1/prefill`: a prefix that comes before its candidates is computed at once and pinned until they are there."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from limbeck.serve.api.shapes import Body, Seconds, Written, described, ids_of, new_id, read, time_limit
from limbeck.serve.errors import Invalid, too_long
from limbeck.serve.service import Service
from limbeck.serve.ticket import Prefill


class PrefillBody(Body):
    """What a later request begins with."""

    query: Written
    """The query of /v1/score, the prompt of /v1/completions, or the query of /rerank."""
    endpoint: Literal["score", "completions", "rerank"] = "score"
    """Which of them is meant; /rerank writes its query into a template."""


class Pinned(BaseModel):
    """A pinned prefix."""

    id: str
    object: Literal["prefill"] = "prefill"
    tokens: int
    expires_in_seconds: float


class Unpinned(BaseModel):
    """It is let go; one that had run out is no error."""

    id: str
    deleted: bool = True


def router(service: Service) -> APIRouter:
    """The endpoints over a service."""
    api = APIRouter(tags=["scoring"])

    @api.post("/v1/prefill", openapi_extra=described(PrefillBody))
    async def prefill(request: Request, timeout: Seconds = None) -> Pinned:
        until = time_limit(service, timeout)
        body = await read(service, request, PrefillBody)
        query = body.query
        if body.endpoint == "rerank":
            if not isinstance(query, str):
                raise Invalid("query: /rerank takes text.", "query")
            query = service.rank_prompt.prefix_of(query)
        (tokens,) = await ids_of(service, [query], "query", special=True)
        if not tokens:
            raise Invalid("query: 0 tokens; there is nothing to read.", "query")
        if len(tokens) > service.decoder.max_tokens:
            raise too_long(len(tokens), 0, service.decoder.max_tokens, "query")
        size = len(tokens) * service.decoder.bytes_per_token
        service.budget.check(size, f"a query of {len(tokens)} tokens takes")
        pin = new_id("pin")
        async with service.dispatcher.hand_in([Prefill(tokens, pin)], until) as ticket:
            async for _ in ticket.outcomes():
                pass
        service.metrics.prompt_tokens.inc(len(tokens))
        service.metrics.succeeded("prefill")
        return Pinned(id=pin, tokens=len(tokens), expires_in_seconds=service.limits.pin_seconds)

    @api.delete("/v1/prefill/{pin}")
    async def unpin(pin: str) -> Unpinned:
        service.worker.unpin(pin)
        return Unpinned(id=pin)

    return api
