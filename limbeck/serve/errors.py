"""What goes wrong becomes an answer in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from limbeck.errors import LimbeckError
from limbeck.serve.dispatch import retry_after
from limbeck.serve.gate import error_body
from limbeck.serve.metrics import Metrics
from limbeck.serve.ticket import Refusal

log = logging.getLogger(__name__)


class Invalid(Exception):
    """A request that cannot be done as it is: 422."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


def status_and_body(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of any exception; what nobody foresaw is logged, and 500."""
    if isinstance(error, Refusal):
        headers = {} if error.retry_seconds is None else {"retry-after": retry_after(error.retry_seconds)}
        return error.status, error_body(error.status, str(error)), headers
    if isinstance(error, Invalid):
        return 422, error_body(422, str(error), error.parameter), {}
    if isinstance(error, LimbeckError):
        return 422, error_body(422, str(error)), {}
    if isinstance(error, RequestValidationError):
        status, message, parameter = _validation(error.errors())
        return status, error_body(status, message, parameter), {}
    if isinstance(error, HTTPException):
        return error.status_code, error_body(error.status_code, str(error.detail)), dict(error.headers or {})
    log.error("a request failed", exc_info=error)
    return 500, error_body(500, "The server failed on this request; its log has the cause."), {}


def install(app: FastAPI, metrics: Metrics) -> None:
    """Answer all exceptions of an app this way."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        status, body, headers = status_and_body(error)
        metrics.refused(status)
        return JSONResponse(body, status, headers)

    for kind in (Refusal, Invalid, LimbeckError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _validation(errors: Sequence[Any]) -> tuple[int, str, str | None]:
    """Of the first of pydantic's errors, without the input, which may be huge or no text at all."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return 400, f"The body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}.", None
    place = ".".join(str(part) for part in first["loc"][1:])[:200].encode("utf-8", "replace").decode()
    return 422, f"{place or 'body'}: {first['msg'].removeprefix('Value error, ')}"[:1000], place or None
