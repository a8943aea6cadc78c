"""What every request passes before an endpoint sees it, as plain ASGI: who asks, size and speed of the body, shutdown.

The whole body is read here. So a slow or endless one costs no endpoint anything, and from then on the only thing that
can arrive is that the client has gone: its endpoint is then cancelled, which lets go of what the engine holds for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from limbeck.serve.admission import Admission, Denial
from limbeck.serve.config import LimitsConfig, ServeConfig

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ping", "/"})
"""Need no key: probes, and the page, which asks for one."""

SINGLE = (b"host", b"origin", b"authorization", b"content-type", b"content-encoding", b"x-request-timeout-seconds")
"""Headers that are decided by."""


class Gone(Exception):
    """The client went away in the middle of its request."""


class Gate:
    """Middleware; counts what is under way."""

    def __init__(self, app: App, config: ServeConfig) -> None:
        self._app, self._limits = app, config.limits
        self._admission = Admission(config.host, config.allow_host, config.allow_origin, config.api_key)
        self.under_way = 0
        self.is_closing = False
        """Answer 503 to what is new."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        denial = self._denial(scope)
        if denial is not None:
            await refuse(send, denial)
            return
        self.under_way += 1
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await _read(receive, self._limits)
            if body is None:
                await refuse(send, _too_large(self._limits))
            else:
                await _run_while_there(self._app, scope, body, receive, send)
        except Gone:
            return
        except TimeoutError:
            await refuse(send, Denial(408, f"The body took longer than {self._limits.body_seconds:g} s."))
        finally:
            self.under_way -= 1

    def _denial(self, scope: Message) -> Denial | None:
        if self.is_closing:
            return Denial(503, "The server is shutting down.")
        denial = _unfit(scope, self._limits)
        if denial is not None:
            return denial
        headers = dict(scope["headers"])
        denial = self._admission.denial(scope["method"], headers, scope["path"] in OPEN_PATHS)
        length = headers.get(b"content-length", b"")
        if denial is None and length.isdigit() and int(length[:20]) > self._limits.body_bytes:
            return _too_large(self._limits)
        return denial


def _unfit(scope: Message, limits: LimitsConfig) -> Denial | None:
    """For an address and headers that are too long, or say two things."""
    line = len(scope["raw_path"]) + len(scope["query_string"])
    if line + sum(len(name) + len(value) for name, value in scope["headers"]) > limits.header_bytes:
        return Denial(431, f"Address and headers have more than {limits.header_bytes} bytes, the server's limit.")
    names = [name for name, _ in scope["headers"]]
    twice = next((name for name in SINGLE if names.count(name) > 1), None)
    if twice is not None:  # which one counts, a proxy in front may see in another way
        return Denial(400, f"The header {twice.decode()} stands there twice; send it once.")
    return None


def _too_large(limits: LimitsConfig) -> Denial:
    return Denial(413, f"The body is larger than {limits.body_bytes} bytes, the server's limit.")


async def _read(receive: Receive, limits: LimitsConfig) -> bytes | None:
    """The body; None when it is too large. Raises: Gone."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        body += message.get("body", b"")
        if len(body) > limits.body_bytes:
            return None
        if not message.get("more_body", False):
            return bytes(body)


async def _run_while_there(app: App, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
    """Run an endpoint until it ends or its client is gone."""
    answer = asyncio.ensure_future(app(scope, replayed(body), send))
    watch = asyncio.ensure_future(receive())
    try:
        await asyncio.wait((answer, watch), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
        try:
            await answer
        except asyncio.CancelledError:
            if not answer.cancelled():  # it is this task that was cancelled
                raise
    finally:
        watch.cancel()
        answer.cancel()


def replayed(body: bytes) -> Receive:
    """A request that was read, as an endpoint reads it; that a client has gone, another one sees."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.get_running_loop().create_future()  # never
        raise AssertionError

    return replay


async def refuse(send: Send, denial: Denial) -> None:
    """Answer, and take nothing more from this connection: what the client still sends is not read."""
    content = json.dumps(error_body(denial.status, denial.message)).encode()
    pairs = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
    if denial.status == 503:
        pairs["retry-after"] = "5"
    if denial.status == 401:
        pairs["www-authenticate"] = "Bearer"
    raw = [(name.encode(), value.encode()) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": denial.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


def error_body(
    status: int, message: str, parameter: str | None = None, code: str | int | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = KINDS.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": status if code is None else code}}
