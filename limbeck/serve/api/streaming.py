"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.responses import StreamingResponse

from limbeck.serve.errors import status_and_body
from limbeck.serve.service import Service

Events = AsyncGenerator[str, None]
"""JSON texts."""
LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""Valid in JSON, but clients that split at Python's line ends would cut an event in two."""


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


async def stream(service: Service, events: Events, has_names: bool = False) -> EventStream:
    """A response of `data:` lines, closed by [DONE]. What is refused before the first event is no stream yet.

    Args:
      has_names: events have a `type`, which is told in a line of its own, and no [DONE] follows.
    Raises: whatever the events do before the first one.
    """
    try:
        first = await anext(events)
    except BaseException:
        await events.aclose()
        raise

    async def lines() -> AsyncGenerator[str, None]:
        try:
            yield line(first, has_names)
            async for event in events:
                yield line(event, has_names)
        except Exception as error:  # the status has gone out already
            status, body, _ = status_and_body(error)
            service.metrics.refused(status)
            yield line(json.dumps({"type": "error", **body["error"]} if has_names else body), has_names)
        finally:
            await events.aclose()
        if not has_names:
            yield "data: [DONE]\n\n"

    return EventStream(lines())


def line(event: str, has_name: bool = False) -> str:
    """An event as it is sent."""
    name = f"event: {json.loads(event)['type']}\n" if has_name else ""
    for end, escaped in LINE_ENDS.items():
        event = event.replace(end, escaped)
    return f"{name}data: {event}\n\n"
