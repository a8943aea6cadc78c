"""Types of fields that several endpoints take, and how a body becomes one of them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Header, Request, Response
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, PrivateAttr, WithJsonSchema, model_validator

from limbeck.serve.api.fields import refuse_known
from limbeck.serve.errors import Invalid, too_long
from limbeck.serve.service import Service

SMALL_BYTES = 4 << 10
"""Bodies up to this size are read on the event loop."""
PIECE_BYTES = 64 << 10
"""Of an answer, as it is sent."""
PIECE_VALUES = 4096
"""Of a list, as it is written."""
TOKEN_LIMIT = 1 << 31


def _ids(value: list[Any]) -> list[int]:
    """Raises: ValueError for a list of anything but token ids; a boolean or a text that reads like a number is none."""
    if set(map(type, value)) - {int}:
        place = next(place for place, one in enumerate(value) if type(one) is not int)
        raise ValueError(f"element {place} is {_name(value[place])}; token ids are whole numbers")
    if value and not 0 <= min(value) <= max(value) < TOKEN_LIMIT:
        raise ValueError(f"token ids {min(value)} to {max(value)}; an id is 0 or more")
    return value


def _text_or_ids(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _ids(value)
    raise ValueError(f"{_name(value)}; give a text, or a list of token ids")


def _texts(value: Any) -> list[str | list[int]]:
    """One text, ids of one, or several of either, as a list of texts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(f"{_name(value)}; give a text, a list of texts, or token ids")
    if value and isinstance(value[0], int | float):
        return [_ids(value)]
    for place, one in enumerate(value):
        if isinstance(one, list):
            _ids(one)
        elif not isinstance(one, str):
            raise ValueError(f"element {place} is {_name(one)}; give a text, a list of texts, or token ids")
    return value


def _name(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return "null" if value is None else names[type(value)]


_TEXT: dict[str, Any] = {"type": "string"}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": TOKEN_LIMIT}}
_ONE: dict[str, Any] = {"anyOf": [_TEXT, _IDS]}

TextOrIds = str | list[int]
Ids = Annotated[list[int], PlainValidator(lambda value: _ids(_listed(value))), WithJsonSchema(_IDS)]
Written = Annotated[TextOrIds, PlainValidator(_text_or_ids), WithJsonSchema(_ONE)]
"""A text, or the token ids of one."""
Texts = Annotated[
    list[TextOrIds],
    PlainValidator(_texts),
    WithJsonSchema({"anyOf": [*_ONE["anyOf"], {"type": "array", "items": _ONE}]}),
]
"""One or several, always as a list."""
Seconds = Annotated[float | None, Header(alias="X-Request-Timeout-Seconds", gt=0, allow_inf_nan=False)]


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{_name(value)}; give a list of token ids")
    return value


class Shape(BaseModel):
    """An object of a body. A field that is null is one that is not given."""

    model_config = ConfigDict(protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Body(Shape):
    """A request's body. What `fields` knows and nobody here does is refused, what nobody knows is passed over."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    _size: int = PrivateAttr(0)

    @property
    def size_bytes(self) -> int:
        """Of the body as it came."""
        return self._size


Kind = TypeVar("Kind", bound=Body)


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None
    completion_tokens_details: dict[str, int] | None = None


async def read(service: Service, request: Request, kind: type[Kind]) -> Kind:
    """The body of a request for the model that is served.

    Raises: ValidationError; Invalid for fields that are known and not done, for too many values and another model.
    """
    data = await request.body()
    most = service.limits.body_values
    if len(data) <= SMALL_BYTES:
        body = _parsed(data, kind, most)
    else:
        body = await service.threads.run(len(data), lambda: _parsed(data, kind, most))
    body._size = len(data)
    if body.model not in (None, "", service.name, service.config.model):
        message = f"The model {body.model[:100]!r} does not exist here; {service.name!r} is served."
        raise Invalid(message, "model", 404, "model_not_found")
    return body


def _parsed(data: bytes, kind: type[Kind], most: int) -> Kind:
    # Counted before it is read: each value of JSON becomes an object that is many times as large.
    values = data.count(b",") + 2 * (data.count(b"[") + data.count(b"{"))
    if values > most:
        raise Invalid(f"The body has about {values} values; the server's limit is {most}.")
    body = kind.model_validate_json(data)
    refuse_known(body)
    return body


def described(kind: type[Body]) -> dict[str, Any]:
    """A body's part of the OpenAPI description."""
    schema = kind.model_json_schema(by_alias=True)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema)}}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references, which would point into another document."""
    definitions = schema.pop("$defs", {})

    def walk(tree: Any) -> Any:
        if isinstance(tree, dict):
            if "$ref" in tree:
                return walk(definitions[tree["$ref"].rpartition("/")[2]])
            return {name: walk(value) for name, value in tree.items()}
        return [walk(value) for value in tree] if isinstance(tree, list) else tree

    return dict(walk(schema))


async def written(service: Service, size: int, make: Callable[[], BaseModel | dict[str, Any] | str]) -> Response:
    """An answer of about so many bytes, made and written beside the event loop, for it may be large."""

    def text() -> str:
        made = make()
        return made if isinstance(made, str) else as_json(made)

    return JsonText(await service.threads.run(size, text))


def as_json(value: Any) -> str:
    """JSON, a piece at a time: a call that writes all at once keeps every other thread waiting.

    Args:
      value: plain values, or a model, whose fields without a value are left out.
    """
    if isinstance(value, BaseModel):
        value = {name: one for name, one in value if one is not None}
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(name)}:{as_json(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list) and value and isinstance(value[0], BaseModel | dict | list):
        return "[" + ",".join(map(as_json, value)) + "]"
    if isinstance(value, list):
        pieces = (value[start : start + PIECE_VALUES] for start in range(0, len(value), PIECE_VALUES))
        return "[" + ",".join(json.dumps(piece, ensure_ascii=False)[1:-1] for piece in pieces) + "]"
    return json.dumps(value, ensure_ascii=False)


class JsonText(Response):
    """JSON that is written already, sent in pieces, so that a slow reader holds no copy of it in the system."""

    media_type = "application/json"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = memoryview(self.body)
        for start in range(0, len(body), PIECE_BYTES):
            more = start + PIECE_BYTES < len(body)
            piece = bytes(body[start : start + PIECE_BYTES])
            await send({"type": "http.response.body", "body": piece, "more_body": more})


def new_id(kind: str) -> str:
    """An id that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"


def now() -> int:
    """Unix time in seconds."""
    return int(time.time())


def time_limit(service: Service, seconds: float | None) -> float:
    """When a request's time is over, of `time.monotonic`; None allows what the server does."""
    return time.monotonic() + min(service.limits.seconds, seconds or service.limits.seconds)


async def ids_of(service: Service, texts: Sequence[TextOrIds], parameter: str, special: bool) -> list[list[int]]:
    """Token ids of texts; given ids are checked and taken as they are.

    Raises: Invalid for ids that the model does not have, and for texts that no context has room for.
    """
    plain = [text for text in texts if isinstance(text, str)]
    longest = max(map(len, plain), default=0)
    if longest > service.vocabulary.longest * service.decoder.max_tokens:  # not even worth counting
        tokens = longest // service.vocabulary.longest
        raise too_long(tokens, 0, service.decoder.max_tokens, parameter)
    encoded = iter(await service.texts.encode(plain, special))
    found = [next(encoded) if isinstance(text, str) else text for text in texts]
    limit = service.decoder.embeddings
    for ids, text in zip(found, texts, strict=True):
        if not isinstance(text, str) and ids and max(ids) >= limit:
            raise Invalid(f"A token id is beyond the model's vocabulary, 0 to {limit - 1}.", parameter)
    return found


Positive = Annotated[int, Field(ge=1, lt=TOKEN_LIMIT)]
Count = Annotated[int, Field(ge=0, lt=TOKEN_LIMIT)]
