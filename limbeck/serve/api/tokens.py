"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from limbeck.serve.api.messages import ChatPrompt, prompt_ids
from limbeck.serve.api.shapes import Body, Ids, described, ids_of, read, written
from limbeck.serve.errors import Invalid
from limbeck.serve.service import Service


class TokenizeBody(ChatPrompt):
    """A text, or messages for the chat template."""

    prompt: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Tokens(BaseModel):
    """Of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Body):
    """Tokens of a text."""

    tokens: Ids


class Text(BaseModel):
    """Of tokens, special ones included."""

    prompt: str


def router(service: Service) -> APIRouter:
    """The endpoints over a service."""
    api = APIRouter(tags=["tokens"])
    described_answer: Any = {200: {"model": Tokens}}

    @api.post("/tokenize", openapi_extra=described(TokenizeBody), responses=described_answer)
    async def tokenize(request: Request) -> Response:
        body = await read(service, request, TokenizeBody)
        if (body.prompt is None) == (not body.messages):
            raise Invalid("Give either prompt or messages.", "prompt")
        if body.prompt is not None:
            (ids,) = await ids_of(service, [body.prompt], "prompt", body.add_special_tokens)
        else:
            ids = (await prompt_ids(service, body)).ids
        text_of = service.vocabulary.text_of

        def made() -> dict[str, Any]:
            found = {"count": len(ids), "max_model_len": service.decoder.max_tokens, "tokens": ids}
            return found | ({"token_strs": [text_of(token) for token in ids]} if body.return_token_strs else {})

        return await written(service, body.size_bytes, made)

    @api.post("/detokenize", openapi_extra=described(DetokenizeBody), responses={200: {"model": Text}})
    async def detokenize(request: Request) -> Response:
        body = await read(service, request, DetokenizeBody)
        (ids,) = await ids_of(service, [body.tokens], "tokens", special=False)
        return await written(service, body.size_bytes, lambda: Text(prompt=service.vocabulary.decode(ids)))

    return api
