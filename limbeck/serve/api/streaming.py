"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.responses import StreamingResponse

from limbeck.serve.errors import status_and_body
from limbeck.serve.service import Service

Events = AsyncGenerator[dict[str, Any], None]


class EventStream(StreamingResponse):
    """A stream that closes its source when the client has gone, so that the engine stops."""

    def __init__(self, source: AsyncGenerator[str, None]) -> None:
        super().__init__(source, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._source = source

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


async def stream(service: Service, events: Events) -> EventStream:
    """A response of `data:` lines, closed by [DONE]. What is refused before the first event is no stream yet.

    Raises: whatever the events do before the first one.
    """
    try:
        first = await anext(events)
    except BaseException:
        await events.aclose()
        raise

    async def lines() -> AsyncGenerator[str, None]:
        try:
            yield _line(first)
            async for event in events:
                yield _line(event)
        except Exception as error:  # the status has gone out already
            status, body, _ = status_and_body(error)
            service.metrics.refused(status)
            yield _line(body)
        finally:
            await events.aclose()
        yield "data: [DONE]\n\n"

    return EventStream(lines())


def _line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, allow_nan=False)}\n\n"
