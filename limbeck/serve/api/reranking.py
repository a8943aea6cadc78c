"""The `/rerank` family in Cohere's shape: documents in the order of P(first label)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest
from pydantic import BaseModel, PlainValidator, WithJsonSchema

from limbeck.engine.requests import Request, Scores
from limbeck.serve.api.scoring import LabelBody, first_label, labels_of, run, usage_of
from limbeck.serve.api.shapes import Positive, Seconds, Usage, described, ids_of, new_id, read, time_limit, written
from limbeck.serve.errors import Invalid, too_long
from limbeck.serve.service import Service


class Document(BaseModel):
    """A document as an object."""

    text: str


def _documents(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError("give a list of one document or more")
    for place, one in enumerate(value):
        if not isinstance(one.get("text") if isinstance(one, dict) else one, str):
            raise ValueError(f"element {place}: a document is a text, or an object with one")
    return [one["text"] if isinstance(one, dict) else one for one in value]


_DOCUMENT: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}]
}


class RerankBody(LabelBody):
    """A query and documents."""

    query: str
    documents: Annotated[
        list[str], PlainValidator(_documents), WithJsonSchema({"type": "array", "items": _DOCUMENT, "minItems": 1})
    ]
    top_n: Positive | None = None
    return_documents: bool = True
    max_tokens_per_doc: Positive | None = None
    """A longer document is cut to so many tokens, and to what the model has room for; the answer says so."""


class Ranked(BaseModel):
    """A document and its place in the request."""

    index: int
    document: Document | None = None
    relevance_score: float


class Ranking(BaseModel):
    """Best first."""

    id: str
    model: str
    results: list[Ranked]
    meta: dict[str, Any]
    usage: Usage


def router(service: Service) -> APIRouter:
    """The endpoints over a service."""
    api = APIRouter(tags=["scoring"])
    described_answer: Any = {200: {"model": Ranking}}

    @api.post("/v2/rerank", openapi_extra=described(RerankBody), responses=described_answer)
    @api.post("/v1/rerank", include_in_schema=False)
    @api.post("/rerank", include_in_schema=False)
    async def rerank(request: HttpRequest, timeout: Seconds = None) -> Response:
        until = time_limit(service, timeout)
        body = await read(service, request, RerankBody)
        if len(body.documents) > service.limits.items:
            raise Invalid(f"{len(body.documents)} items; the server's limit is {service.limits.items}.", "documents")
        labels = await labels_of(service, body, is_relative=True)
        (prefix,) = await ids_of(service, [service.rank_prompt.prefix_of(body.query)], "query", special=True)
        items, warnings = await _items(service, body, len(prefix))
        asked = Request(prefix, items, labels)
        (scores,) = await run(service, [asked], until)
        return await written(
            service, body.size_bytes, lambda: _ranking(service, body, scores, warnings, usage_of([asked]))
        )

    return api


async def _items(service: Service, body: RerankBody, prefix_tokens: int) -> tuple[list[list[int]], list[str]]:
    """Tokens of the documents, and what was cut of them."""
    frame = len((await ids_of(service, [service.rank_prompt.item_of("")], "documents", special=False))[0])
    room = service.decoder.max_tokens - prefix_tokens - frame
    if room < 1:
        raise too_long(prefix_tokens + frame, 0, service.decoder.max_tokens, "query")
    most = min(room, body.max_tokens_per_doc or room)
    texts, warnings = list(body.documents), []
    characters = most * service.vocabulary.longest
    found = await ids_of(service, [text[:characters] for text in texts], "documents", special=False)
    cut = {p: ids[:most] for p, ids in enumerate(found) if len(ids) > most or len(texts[p]) > characters}
    decode = service.vocabulary.decode
    read = await service.threads.run(body.size_bytes, lambda: {place: decode(ids) for place, ids in cut.items()})
    for place, text in read.items():
        texts[place] = text
        warnings.append(f"documents.{place} is longer than {most} tokens; it was cut to them.")
    items = await ids_of(service, [service.rank_prompt.item_of(text) for text in texts], "documents", special=False)
    tail = items and max(map(len, items)) > room + frame
    if tail:  # the template's words and the document's joined in another way than apart
        raise Invalid("documents: the longest has no room in the model's context.", "documents")
    return items, warnings


def _ranking(service: Service, body: RerankBody, scores: Scores, warnings: Sequence[str], usage: Usage) -> Ranking:
    values = first_label(scores)
    best = sorted(range(len(values)), key=lambda index: -values[index])[: body.top_n]
    meta: dict[str, Any] = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    return Ranking(
        id=new_id("rerank"),
        model=service.name,
        results=[
            Ranked(
                index=index,
                relevance_score=values[index],
                document=Document(text=body.documents[index]) if body.return_documents else None,
            )
            for index in best
        ],
        meta=meta | ({"warnings": warnings} if warnings else {}),
        usage=usage,
    )
