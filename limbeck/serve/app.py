"""The application: endpoints over a service, behind the gate."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from limbeck.serve import errors
from limbeck.serve.api import about, chat, completions, embeddings, prefilling, reranking, responses, scoring, tokens
from limbeck.serve.service import Service
from limbeck.version import __version__


def make_app(service: Service) -> FastAPI:
    """Endpoints, errors and the engine's life."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(title="limbeck", version=__version__, lifespan=lifespan)
    if service.config.allow_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(service.config.allow_origin), allow_methods=["*"], allow_headers=["*"]
        )
    for endpoints in (about, scoring, reranking, prefilling, completions, chat, responses, embeddings, tokens):
        app.include_router(endpoints.router(service))
    errors.install(app, service.metrics)
    return app
