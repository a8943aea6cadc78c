"""The `/rerank` family in Cohere's shape: documents in the order of P(first label)."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from limbeck.serve.api.scoring import LabelBody, first_label, labels_of, request_of, run, usage_of
from limbeck.serve.api.shapes import Seconds, Usage, check_model, new_id
from limbeck.serve.service import Service


class Document(BaseModel):
    """A document as an object."""

    text: str


class RerankBody(LabelBody):
    """A query and documents."""

    query: str
    documents: Annotated[list[str | Document], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    return_documents: bool = True


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
    meta: dict[str, dict[str, str | int]]
    usage: Usage


def router(service: Service) -> APIRouter:
    """The endpoints over a service."""
    api = APIRouter(tags=["scoring"])

    @api.post("/v2/rerank", response_model_exclude_none=True)
    @api.post("/v1/rerank", response_model_exclude_none=True, include_in_schema=False)
    @api.post("/rerank", response_model_exclude_none=True, include_in_schema=False)
    async def rerank(body: RerankBody, timeout: Seconds = None) -> Ranking:
        check_model(service, body.model)
        texts = [one if isinstance(one, str) else one.text for one in body.documents]
        items = [service.rank_prompt.item_of(text) for text in texts]
        prefix = service.rank_prompt.prefix_of(body.query)
        request = await request_of(service, prefix, [*items], labels_of(service, body))
        (scores,) = await run(service, [request], timeout)
        values = first_label(scores)
        best = sorted(range(len(values)), key=lambda index: -values[index])[: body.top_n]
        return Ranking(
            id=new_id("rerank"),
            model=service.name,
            results=[
                Ranked(
                    index=index,
                    relevance_score=values[index],
                    document=Document(text=texts[index]) if body.return_documents else None,
                )
                for index in best
            ],
            meta={"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
            usage=usage_of([request]),
        )

    return api
