"""Between the endpoints and the engine's thread: admission, waiting for outcomes, and letting go."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from limbeck.serve.config import LimitsConfig
from limbeck.serve.metrics import Metrics
from limbeck.serve.ticket import Refusal, Ticket, Work
from limbeck.serve.worker import Worker

SMOOTHING = 0.9
"""Weight of the past in the mean time between two finished requests."""


class Dispatcher:
    """Lives on the event loop."""

    def __init__(self, worker: Worker, limits: LimitsConfig, metrics: Metrics) -> None:
        self._worker, self._limits, self._metrics = worker, limits, metrics
        self._tickets: set[Ticket] = set()
        self._finished = time.monotonic()
        self._pace_seconds = 0.0

    @property
    def waiting(self) -> int:
        """Requests that the engine has not begun."""
        return sum(ticket.started is None for ticket in self._tickets)

    @property
    def running(self) -> int:
        """Requests that it has."""
        return len(self._tickets) - self.waiting

    @asynccontextmanager
    async def hand_in(self, parts: Sequence[Work], until: float) -> AsyncIterator[Ticket]:
        """Give parts to the engine; leaving lets go of what is not finished.

        Args:
          until: when the request's time is over, of `time.monotonic`.
        Raises: Refusal when too many wait. The ticket's outcomes raise it when the time is over.
        """
        waiting = self.waiting
        if waiting >= self._limits.waiting:
            wait = max(1.0, waiting * self._pace_seconds)
            raise Refusal(429, f"{waiting} requests wait, which is the limit. Try again later.", wait)
        if self._worker.problem is not None:
            raise Refusal(503, self._worker.problem, 5.0)
        ticket = Ticket(parts, until, self._worker.abandon)
        self._tickets.add(ticket)
        self._worker.submit(ticket)
        try:
            yield ticket
        finally:
            self._tickets.discard(ticket)
            if ticket.is_done:
                self._note(ticket)
            else:
                self._worker.cancel(ticket)

    def give_up(self) -> None:
        """Refuse what is not finished: the server ends."""
        for ticket in self._tickets:
            if not ticket.is_over:
                ticket.put(Refusal(503, "The server is shutting down and had no time left for this request.", 5.0))
                self._worker.cancel(ticket)

    def _note(self, ticket: Ticket) -> None:
        now = time.monotonic()
        pace, self._finished = now - max(self._finished, ticket.arrived), now  # idle time is no pace
        self._pace_seconds = SMOOTHING * self._pace_seconds + (1 - SMOOTHING) * pace
        self._metrics.whole.observe(now - ticket.arrived)
        self._metrics.queued.observe((ticket.started or now) - ticket.arrived)


def retry_after(seconds: float) -> str:
    """The header's value: whole seconds, at least one."""
    return str(max(1, math.ceil(seconds)))
