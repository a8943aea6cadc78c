"""Types of fields that several endpoints take."""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any

from fastapi import Header
from pydantic import BaseModel, ConfigDict, Field, model_validator

from limbeck.serve.errors import Invalid
from limbeck.serve.service import Service

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = list[TokenId]
TextOrIds = str | Ids
Seconds = Annotated[float | None, Header(alias="X-Request-Timeout-Seconds", gt=0, allow_inf_nan=False)]


class Body(BaseModel):
    """A request's body. Fields that nobody here knows are passed over, as other servers do."""

    model_config = ConfigDict(protected_namespaces=())

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        """JSON can write half of a surrogate pair, which no tokenizer, template or answer can take."""
        if isinstance(data, bytes):
            # FastAPI reads no JSON out of a body that calls itself a form, as curl's do unless told otherwise.
            raise ValueError("the body is no JSON by its type; send the header content-type: application/json")
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a string has half of a surrogate pair, which is no text") from error
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        return data


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None
    completion_tokens_details: dict[str, int] | None = None


def new_id(kind: str) -> str:
    """An id that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"


def now() -> int:
    """Unix time in seconds."""
    return int(time.time())


def check_model(service: Service, model: str | None) -> None:
    """Raises: Invalid for another model than the one that is served."""
    if model not in (None, "", service.name, service.config.model):
        raise Invalid(f"The model {model[:100]!r} is not served here; {service.name!r} is.", "model")


def refuse(fields: dict[str, Any], reason: str) -> None:
    """Raises: Invalid when one of the fields asks for something."""
    for name, value in fields.items():
        if value:
            raise Invalid(f"{name} is not supported: {reason}", name)


async def ids_of(service: Service, texts: list[TextOrIds], parameter: str, special: bool) -> list[list[int]]:
    """Token ids of texts; given ids are checked and taken as they are.

    Raises: Invalid for ids that the model does not have.
    """
    written = [text for text in texts if isinstance(text, str)]
    encoded = iter(await service.texts.encode(written, special))
    found = [next(encoded) if isinstance(text, str) else text for text in texts]
    limit = service.decoder.embeddings
    for ids in found:
        if any(not 0 <= token < limit for token in ids):
            raise Invalid(f"A token id is beyond the model's vocabulary, 0 to {limit - 1}.", parameter)
    return found
