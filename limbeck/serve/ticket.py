"""A request in hand: its parts, what has come of them, and how that reaches the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from limbeck.engine.embedding import Pooling
from limbeck.engine.jobs import Job, Progress
from limbeck.engine.requests import Request, Scores


class Prefill(NamedTuple):
    """A prefix to compute and to pin."""

    tokens: Sequence[int]
    pin: str
    """What it is called when it is let go."""


class Embed(NamedTuple):
    """Texts that vectors are asked of."""

    texts: Sequence[Sequence[int]]
    """Token ids, at least one each."""
    pooling: Pooling


Work = Request | Job | Prefill | Embed
LATE_SECONDS = 30.0
"""Beyond a deadline, for the engine to end the request itself."""
BURST = 8
"""Outcomes that may be taken in a row."""


def prefix_of(work: Work) -> Sequence[int]:
    """The tokens that others may begin with as well."""
    if isinstance(work, Request):
        return work.prefix
    if isinstance(work, Embed):
        return work.texts[0]
    return work.prompt if isinstance(work, Job) else work.tokens


class Outcome(NamedTuple):
    """What a part has come to, or come on by."""

    part: int
    value: Scores | Progress | Tensor | int
    """Scores of a Request, progress of a Job, vectors of an Embed, tokens pinned for a Prefill."""
    is_last: bool


class Refusal(Exception):
    """Why a request is not done, or no longer; `status` is HTTP's."""

    def __init__(self, status: int, message: str, retry_seconds: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_seconds = status, retry_seconds


class Ticket:
    """Handed to the engine's thread; what comes of it is put here on the event loop."""

    def __init__(self, parts: Sequence[Work], deadline: float, abandon: Callable[[Ticket, int], None]) -> None:
        """`deadline`: of `time.monotonic`."""
        self.parts = list(parts)
        self.arrived = time.monotonic()
        self.deadline = deadline
        self.started: float | None = None
        """When the engine took up its first part."""
        self.is_over = False
        """Nobody waits for it any more: finished, failed or cancelled."""
        self._open = set(range(len(self.parts)))
        self._abandon = abandon
        self._events: asyncio.Queue[Outcome | Exception] = asyncio.Queue()

    def put(self, event: Outcome | Exception) -> None:
        """Called on the loop."""
        self._events.put_nowait(event)

    def drop(self, part: int) -> None:
        """Nothing more is wanted of a part."""
        if part in self._open:
            self._open.discard(part)
            self._abandon(self, part)

    @property
    def is_done(self) -> bool:
        """Whether all parts are finished or dropped."""
        return not self._open

    async def outcomes(self) -> AsyncIterator[Outcome]:
        """What comes of the parts, until all of them are finished.

        Raises: Refusal, or whatever the engine raised.
        """
        while self._open:
            if self._events.qsize() > BURST:  # one that never waits would keep all others from the loop
                await asyncio.sleep(0)
            event = await self._next()
            if isinstance(event, Exception):
                raise event
            if event.part not in self._open:
                continue
            if event.is_last:
                self._open.discard(event.part)
            yield event

    async def _next(self) -> Outcome | Exception:
        try:
            async with asyncio.timeout(self.deadline + LATE_SECONDS - time.monotonic()):
                return await self._events.get()
        except TimeoutError:
            return Refusal(503, "The engine does not answer; see the server's log.", 5.0)
