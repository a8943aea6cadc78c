"""`/v1/embeddings`: vectors of texts, of models whose checkpoint says how they are pooled."""

from __future__ import annotations

import base64
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from torch import Tensor

from limbeck.serve.api.shapes import (
    Body,
    Positive,
    Seconds,
    TextOrIds,
    Texts,
    described,
    ids_of,
    read,
    time_limit,
    written,
)
from limbeck.serve.errors import Invalid, too_long
from limbeck.serve.service import Service
from limbeck.serve.ticket import Embed


class EmbeddingsBody(Body):
    """Texts, or token ids."""

    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Positive | None = None


def router(service: Service) -> APIRouter:
    """The endpoint over a service."""
    api = APIRouter(tags=["embeddings"])

    @api.post("/v1/embeddings", openapi_extra=described(EmbeddingsBody))
    @api.post("/embeddings", include_in_schema=False)
    async def embeddings(request: Request, timeout: Seconds = None) -> Response:
        until = time_limit(service, timeout)
        body = await read(service, request, EmbeddingsBody)
        work = await _work(service, body)
        vectors: Any = None
        async with service.dispatcher.hand_in([work], until) as ticket:
            async for outcome in ticket.outcomes():
                vectors = outcome.value
        tokens = sum(map(len, work.texts))
        service.metrics.prompt_tokens.inc(tokens)
        service.metrics.succeeded("embeddings")
        return await written(service, vectors.numel(), lambda: _answer(service, body, vectors, tokens))

    return api


async def _work(service: Service, body: EmbeddingsBody) -> Embed:
    """Raises: Invalid for what is too much or too long, and where the model has no vectors."""
    if service.pooling is None:
        raise Invalid(f"{service.no_pooling} /v1/score compares texts.", "model", 400, "model_not_supported")
    if not 0 < len(body.input) <= service.limits.items:
        raise Invalid(f"input: {len(body.input)} texts; the server takes 1 to {service.limits.items}.", "input")
    if body.dimensions not in (None, service.decoder.config.get_text_config().hidden_size):
        raise Invalid("dimensions: the model's own alone; leave it out.", "dimensions")
    prompt = service.pooling.prompt
    asked: list[TextOrIds] = [prompt + text if isinstance(text, str) else text for text in body.input]
    texts = await ids_of(service, asked, "input", special=True)
    if not all(texts):
        raise Invalid("input: a text without a token has no vector.", "input")
    longest = max(map(len, texts))
    if longest > service.decoder.max_tokens:
        raise too_long(longest, 0, service.decoder.max_tokens, "input")
    service.budget.check(longest * service.decoder.bytes_per_token, f"a text of {longest} tokens takes")
    return Embed(texts, service.pooling)


def _answer(service: Service, body: EmbeddingsBody, vectors: Tensor, tokens: int) -> dict[str, Any]:
    rows = vectors.cpu().numpy()
    values = [
        base64.b64encode(row.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else row.tolist()
        for row in rows
    ]
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": service.name, "usage": usage}
