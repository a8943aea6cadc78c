"""What every request passes before an endpoint sees it, as plain ASGI: key, size and speed of the body, shutdown.

The whole body is read here. So a slow or endless one costs no endpoint anything, and from then on the only thing that
can arrive is that the client has gone: its endpoint is then cancelled, which lets go of what the engine holds for it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from limbeck.serve.config import LimitsConfig

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ping", "/"})
"""Need no key: probes, and the page, which asks for one."""


class Gone(Exception):
    """The client went away in the middle of its request."""


class Gate:
    """Middleware; counts what is under way."""

    def __init__(self, app: App, limits: LimitsConfig, api_key: str | None) -> None:
        self._app, self._limits, self._api_key = app, limits, api_key
        self.under_way = 0
        self.is_closing = False
        """Answer 503 to what is new."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self.is_closing:
            await _refuse(send, 503, "The server is shutting down.", {"connection": "close", "retry-after": "5"})
            return
        self.under_way += 1
        try:
            await self._admit(scope, receive, send)
        finally:
            self.under_way -= 1

    async def _admit(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if self._api_key is not None and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            await _refuse(send, 401, "A valid key is needed: send it as `Authorization: Bearer KEY`.")
            return
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await self._read(headers, receive)
        except Gone:
            return
        except TimeoutError:
            message = f"The body took longer than {self._limits.body_seconds:g} s."
            await _refuse(send, 408, message, {"connection": "close"})
            return
        if body is None:
            message = f"The body is larger than {self._limits.body_bytes} bytes, the server's limit."
            await _refuse(send, 413, message, {"connection": "close"})
            return
        await _run_while_there(self._app, scope, body, receive, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        assert self._api_key is not None
        sent = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        return hmac.compare_digest(sent, self._api_key.encode())

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The body; None when it is too large."""
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._limits.body_bytes:
            return None
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            body += message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                return None
            if not message.get("more_body", False):
                return bytes(body)


async def _run_while_there(app: App, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
    """Run an endpoint until it ends or its client is gone."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.get_running_loop().create_future()  # never; the watch below sees a client go
        raise AssertionError

    answer = asyncio.ensure_future(app(scope, replay, send))
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


async def _refuse(send: Send, status: int, message: str, headers: dict[str, str] | None = None) -> None:
    content = json.dumps(error_body(status, message)).encode()
    pairs = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


KINDS = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 413: "invalid_request_error"}


def error_body(status: int, message: str, parameter: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = KINDS.get(status) or ("rate_limit_error" if status == 429 else "")
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": status}}
