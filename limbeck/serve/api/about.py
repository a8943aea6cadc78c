"""What is served and how it is: models, health, counters."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from limbeck.serve.errors import Invalid
from limbeck.serve.service import Service
from limbeck.serve.ticket import Refusal
from limbeck.version import __version__

PAGE = Path(__file__).parents[1] / "page.html"
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""Nothing from elsewhere, and no other page around it."""


class Examples(BaseModel):
    """What the page offers to try."""

    prompts: list[str]
    query: str
    documents: list[str]
    labels: str = ""


WORDS = Examples(
    prompts=["Why is the sky blue?", "Write a haiku about rain.", "What is 17 times 23? Think step by step."],
    query="a fruit that grows on trees",
    documents=["a ripe apple", "a claw hammer", "cherries in June", "the annual report"],
)
SUMS = Examples(prompts=["7a+4b*3c-8d+9", "12+30", "5a*2b"], query="12+3", documents=["=15", "=16", "=1"], labels="1|2")
"""For the built-in models, whose tokenizer has the characters of sums alone."""


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "limbeck"
    root: str
    max_model_len: int
    can_chat: bool
    """Whether it has a chat template."""
    can_rank: bool
    """Whether it has label tokens of its own, or the tokenizer has those that are taken without."""
    examples: Examples


class Models(BaseModel):
    """All of them, which is one."""

    object: str = "list"
    data: list[Model]


def router(service: Service) -> APIRouter:
    """The endpoints over a service."""
    api = APIRouter(tags=["about"])
    model = Model(
        id=service.name,
        created=service.created,
        root=service.config.model,
        max_model_len=service.decoder.max_tokens,
        can_chat=bool(service.tokenizer.chat_template),
        can_rank=service.labels is not None,
        examples=WORDS if _reads(service, WORDS.prompts[0]) else SUMS,
    )

    @api.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    @api.get("/v1/models")
    async def models() -> Models:
        return Models(data=[model])

    @api.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        if name != service.name:
            message = f"The model {name[:100]!r} does not exist here; {service.name!r} is served."
            raise Invalid(message, "model", 404, "model_not_found")
        return model

    @api.get("/health")
    @api.head("/health", include_in_schema=False)
    @api.api_route("/ping", methods=["GET", "HEAD"], include_in_schema=False)
    async def health() -> dict[str, str]:
        if service.worker.problem is not None:
            raise Refusal(503, service.worker.problem, 5.0)
        return {"status": "ok"}

    @api.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @api.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return api


def _reads(service: Service, text: str) -> bool:
    """Whether the tokenizer has all characters of a text."""
    ids = service.tokenizer.encode(text, add_special_tokens=False)
    return service.vocabulary.decode(ids).strip() == text
