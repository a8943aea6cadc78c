"""What goes wrong becomes an answer in OpenAI's shape."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from limbeck.errors import LimbeckError
from limbeck.serve.dispatch import retry_after
from limbeck.serve.gate import error_body
from limbeck.serve.metrics import Metrics
from limbeck.serve.ticket import Refusal

log = logging.getLogger(__name__)


class Invalid(Exception):
    """A request that cannot be done as it is."""

    def __init__(self, message: str, parameter: str | None = None, status: int = 422, code: str | None = None) -> None:
        """`code`: OpenAI's word for it, where clients act on one."""
        super().__init__(message)
        self.parameter, self.status, self.code = parameter, status, code


def too_long(tokens: int, more: int, limit: int, parameter: str) -> Invalid:
    """For a prompt, with the text behind it, that the model has no room for."""
    asked = f"{tokens} tokens" + (f" and {more} more of the text" if more else "")
    # The code stands in the words as well, since some clients look for it there.
    message = (
        f"This model's maximum context length is {limit} tokens; {parameter} has {asked} (context_length_exceeded)."
    )
    return Invalid(message, parameter, 400, "context_length_exceeded")


def status_and_body(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of any exception; what nobody foresaw is logged, and 500."""
    if isinstance(error, Refusal):
        headers = {} if error.retry_seconds is None else {"retry-after": retry_after(error.retry_seconds)}
        return error.status, error_body(error.status, str(error)), headers
    if isinstance(error, Invalid):
        return error.status, error_body(error.status, str(error), error.parameter, error.code), {}
    if isinstance(error, LimbeckError):
        return 422, error_body(422, str(error)), {}
    if isinstance(error, RequestValidationError | ValidationError):
        status, message, parameter = _validation(error)
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

    for kind in (Refusal, Invalid, LimbeckError, RequestValidationError, ValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _validation(error: RequestValidationError | ValidationError) -> tuple[int, str, str | None]:
    """Of the first of pydantic's errors, without the input, which may be huge or no text at all."""
    is_body = isinstance(error, ValidationError)
    first: Any = error.errors(include_input=False, include_url=False)[0] if is_body else error.errors()[0]  # type: ignore[call-arg]
    if first["type"] == "json_invalid":
        return 400, f"The body is not valid JSON: {first['ctx']['error']}.", None
    path = [str(part) for part in (first["loc"] if is_body else first["loc"][1:])]
    place = ".".join(path)[:200].encode("utf-8", "replace").decode()
    parameter = path[0][:200].encode("utf-8", "replace").decode() if path else None
    return 422, f"{place or 'body'}: {first['msg'].removeprefix('Value error, ')}"[:1000], parameter
