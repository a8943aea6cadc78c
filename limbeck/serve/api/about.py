"""What is served and how it is: models, health, counters."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from limbeck import __version__
from limbeck.serve.service import Service
from limbeck.serve.ticket import Refusal

PAGE = Path(__file__).parents[1] / "page.html"


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "limbeck"
    root: str
    max_model_len: int


class Models(BaseModel):
    """All of them, which is one."""

    object: str = "list"
    data: list[Model]


def router(service: Service) -> APIRouter:
    """The endpoints over a service."""
    api = APIRouter(tags=["about"])
    model = Model(
        id=service.name, created=service.created, root=service.config.model, max_model_len=service.decoder.max_tokens
    )

    @api.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @api.get("/v1/models")
    async def models() -> Models:
        return Models(data=[model])

    @api.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        if name != service.name:
            raise Refusal(404, f"The model {name[:100]!r} is not served here; {service.name!r} is.")
        return model

    @api.get("/health")
    @api.get("/ping", include_in_schema=False)
    async def health() -> dict[str, str]:
        if not service.worker.is_alive():
            raise Refusal(503, "The engine has ended; see the server's log.")
        return {"status": "ok"}

    @api.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @api.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return api
