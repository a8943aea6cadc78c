"""Connections at the edge of the network, with uvicorn's protocols (h11, or httptools where it is installed).

A connection is idle, or a request is under way on it. Each state has its time: an idle one must bring a whole header,
a busy one must have taken its answer by `limits.seconds`. When there are too many, the one that has been idle for
longest makes room, so that whoever holds connections open shuts nobody out.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from limbeck.serve.config import LimitsConfig

ANSWER_SECONDS = 5.0
"""Beyond `limits.seconds`, to take what was written until then."""
BACKLOG = 128
"""Connections that the system accepts ahead, and asyncio at once."""
OTHER_FILES = 56
"""Of the process: models, pipes, the log."""


class Connections:
    """All of a server's."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.limits = limits
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = limits.connections + BACKLOG + OTHER_FILES
        if soft < needed and (hard == resource.RLIM_INFINITY or soft < hard):
            soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self.backlog = max(1, min(BACKLOG, soft // 4))
        self.most = max(1, min(limits.connections, soft - self.backlog - OTHER_FILES))
        self._idle: dict[Any, None] = {}
        """Those without a request, in the order of when that began."""
        self._open: set[Any] = set()

    def enter(self, connection: Any) -> None:
        """Take in a new one; the one that is idle for longest goes if there is no room."""
        if len(self._open) >= self.most:
            leaving = next(iter(self._idle), connection)
            self._idle.pop(leaving, None)
            leaving.transport.abort()
        self._open.add(connection)
        self._idle[connection] = None

    def mark(self, connection: Any, is_idle: bool) -> None:
        """Note whether a request is under way."""
        self._idle.pop(connection, None)
        if is_idle and connection in self._open:
            self._idle[connection] = None

    def leave(self, connection: Any) -> None:
        """It is closed."""
        self._idle.pop(connection, None)
        self._open.discard(connection)


def protocol_over(connections: Connections, base: Any = AutoHTTPProtocol) -> type[asyncio.Protocol]:
    """A class of protocols that keep to the limits; `base`: uvicorn's, over its parser of choice."""
    limits = connections.limits

    class Limited(base):
        """One connection."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer: asyncio.TimerHandle | None = None
            self._header_bytes = 0
            connections.enter(self)
            self._arm(limits.header_seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self._arm(None)
            connections.leave(self)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            was_busy = self._is_busy
            super().data_received(data)
            if self._is_busy:
                if not was_busy:
                    self._begin()
                return
            self._header_bytes += len(data)
            if self._header_bytes > limits.header_bytes:
                self.transport.abort()
            elif self._timer is None:
                self._arm(limits.header_seconds)

        def on_response_complete(self) -> None:
            self._arm(None)  # the parser's own timer closes what stays idle
            connections.mark(self, is_idle=True)
            super().on_response_complete()
            if self._is_busy:  # by a request that was there already
                self._begin()

        @property
        def _is_busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _begin(self) -> None:
            self._header_bytes = 0
            connections.mark(self, is_idle=False)
            self._arm(limits.seconds + ANSWER_SECONDS)

        def _arm(self, seconds: float | None) -> None:
            """Close the connection after so long, whatever is still to be written; None lets it be."""
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    return Limited
