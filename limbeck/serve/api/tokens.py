"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from limbeck.serve.api.chat import render
from limbeck.serve.api.shapes import Body, Ids, check_model, ids_of
from limbeck.serve.errors import Invalid
from limbeck.serve.service import Service


class TokenizeBody(Body):
    """A text, or messages for the chat template."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
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

    @api.post("/tokenize", response_model_exclude_none=True)
    async def tokenize(body: TokenizeBody) -> Tokens:
        check_model(service, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Invalid("Give either prompt or messages.", "prompt")
        if body.prompt is not None:
            (ids,) = await service.texts.encode([body.prompt], body.add_special_tokens)
        else:
            (ids,) = await service.texts.encode([render(service, body.messages or (), {})], special=False)
        return Tokens(
            count=len(ids),
            max_model_len=service.decoder.max_tokens,
            tokens=ids,
            token_strs=[service.vocabulary.text_of(token) for token in ids] if body.return_token_strs else None,
        )

    @api.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Text:
        check_model(service, body.model)
        (ids,) = await ids_of(service, [body.tokens], "tokens", special=False)
        return Text(prompt=service.vocabulary.decode(ids))

    return api
