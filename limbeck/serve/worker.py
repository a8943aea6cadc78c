"""The engine's thread: it alone touches scorer and generator, and goes round as long as there is work.

    take in what has arrived -> let go what is cancelled or late -> score a batch -> a step of generation -> tell

A round scores `batch_tokens` tokens, and a piece of one request that is larger, so that texts under way wait for no
more than that. What comes of it goes to the event loop once a round.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from limbeck.engine.constraints import GrammarConstraint
from limbeck.engine.generation import Generator
from limbeck.engine.jobs import Job
from limbeck.engine.requests import Request
from limbeck.engine.scoring import Pin, Scorer
from limbeck.errors import ConfigError
from limbeck.serve.config import ServeConfig
from limbeck.serve.line import Line, Part
from limbeck.serve.long import LongRequest, size_of
from limbeck.serve.ticket import Outcome, Prefill, Refusal, Ticket, Work, prefix_of

IDLE_SECONDS = 1.0
"""How often an idle engine looks for pins that have run out."""
PIECES = 4
"""Of a batch: a larger request is scored in pieces of this share, one a round."""


class Held(NamedTuple):
    """A pinned prefix."""

    pin: Pin
    until: float


class Worker(threading.Thread):
    """Other threads call `submit`, `cancel`, `unpin` and `stop`."""

    def __init__(
        self, scorer: Scorer, generator: Generator, config: ServeConfig, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.scorer, self.generator, self.config, self._loop = scorer, generator, config, loop
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._to_score = Line(scorer.cache.holds, config.turn)
        self._to_generate = Line(scorer.cache.holds, config.turn)
        self._jobs: dict[int, Part] = {}
        """Under way, by the generator's number."""
        self._long: deque[LongRequest] = deque()
        """Scoring requests larger than a batch, in turns."""
        self._pins: dict[str, Held] = {}
        self._events: list[tuple[Ticket, Outcome | Exception]] = []
        self._is_stopped = False

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket."""
        self._inbox.put(lambda: self._take(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more."""
        ticket.is_over = True
        self._inbox.put(lambda: self._drop(ticket))

    def abandon(self, ticket: Ticket, number: int) -> None:
        """Nothing more is wanted of one of its parts."""
        self._inbox.put(lambda: self._drop(ticket, number))

    def unpin(self, name: str) -> None:
        """Let a pinned prefix go."""
        self._inbox.put(lambda: self._release(name))

    def stop(self) -> None:
        """End the thread after the round under way."""
        self._inbox.put(self._end)

    def run(self) -> None:
        while not self._is_stopped:
            self._read_inbox()
            self._let_go()
            self._score()
            self._go_on()
            self._generate()
            if self._events:
                events, self._events = self._events, []
                self._loop.call_soon_threadsafe(_deliver, events)

    def _read_inbox(self) -> None:
        is_idle = not (self._to_score.parts or self._to_generate.parts or self._jobs or self._long)
        try:
            if is_idle:
                self._inbox.get(timeout=IDLE_SECONDS)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _take(self, ticket: Ticket) -> None:
        for number, work in enumerate(() if ticket.is_over else ticket.parts):
            line = self._to_generate if isinstance(work, Job) else self._to_score
            line.parts.append(Part(ticket, number, self.scorer.cache.keys_of(prefix_of(work))))

    def _drop(self, ticket: Ticket, number: int | None = None) -> None:
        """Forget what is left of a ticket, or of one of its parts."""
        self._to_score.drop(ticket, number)
        self._to_generate.drop(ticket, number)
        for long in [long for long in self._long if long.part.belongs(ticket, number)]:
            long.release()
            self._long.remove(long)
        for job in [job for job, part in self._jobs.items() if part.belongs(ticket, number)]:
            self.generator.abort(job)
            del self._jobs[job]

    def _release(self, name: str) -> None:
        held = self._pins.pop(name, None)
        if held is not None:
            held.pin.release()

    def _end(self) -> None:
        self._is_stopped = True

    def _let_go(self) -> None:
        """End pins and tickets whose time is over."""
        now = time.monotonic()
        for name in [name for name, held in self._pins.items() if held.until <= now]:
            self._release(name)
        long = [long.part for long in self._long]
        parts = [*self._to_score.parts, *long, *self._to_generate.parts, *self._jobs.values()]
        for ticket in {id(part.ticket): part.ticket for part in parts if part.ticket.deadline <= now}.values():
            if ticket.started is None:
                self._fail(ticket, Refusal(429, "The request's time was over before its turn came.", 1.0))
            else:
                self._fail(ticket, Refusal(408, "The request's time is over; ask for less, or allow more seconds."))

    def _score(self) -> None:
        room = self.config.batch_tokens

        def has_room(part: Part) -> bool:
            nonlocal room
            is_first, size = room == self.config.batch_tokens, _tokens(part.work)
            room -= size
            return is_first or room >= 0

        parts = self._to_score.take(has_room)
        self._start(parts)
        requests: list[tuple[Part, Request]] = []
        for part in parts:
            if _tokens(part.work) > self.config.batch_tokens:
                self._long.append(LongRequest(part, self.scorer, self.config.batch_tokens // PIECES))
            elif isinstance(part.work, Prefill):
                self._prefill(part, part.work)
            elif isinstance(part.work, Request):
                requests.append((part, part.work))
        groups = [requests] if requests else []
        while groups:
            group = groups.pop()
            try:
                found = self.scorer.score([request for _, request in group])
            except Exception as error:  # whatever it is, it ends the request that caused it and not the engine
                if len(group) == 1:
                    self._fail(group[0][0].ticket, error)
                else:
                    groups += [[one] for one in group]
                continue
            for (part, _), scores in zip(group, found, strict=True):
                self._tell(part, scores, True)

    def _go_on(self) -> None:
        """A piece of the large request whose turn it is."""
        if not self._long:
            return
        long = self._long.popleft()
        try:
            scores = long.step()
        except Exception as error:  # as above
            long.release()
            self._fail(long.part.ticket, error)
            return
        if scores is None:
            self._long.append(long)
        else:
            work = long.part.work
            if isinstance(work, Prefill):
                self._prefill(long.part, work)
            else:
                self._tell(long.part, scores, True)
            long.release()

    def _prefill(self, part: Part, work: Prefill) -> None:
        try:
            if len(self._pins) >= self.config.limits.pins:
                raise ConfigError(f"{len(self._pins)} prefixes are pinned, which is the limit.")
            pin = self.scorer.prefill(work.tokens)
        except ConfigError as error:
            self._fail(part.ticket, Refusal(429, str(error), self.config.limits.pin_seconds))
        except Exception as error:  # as above
            self._fail(part.ticket, error)
        else:
            self._pins[work.pin] = Held(pin, time.monotonic() + self.config.limits.pin_seconds)
            self._tell(part, pin.tokens, True)

    def _generate(self) -> None:
        self._to_generate.take(self._admits)
        if not self._jobs:
            if self._to_generate.parts:  # with all of the room there is
                ticket = self._to_generate.parts[0].ticket
                self._fail(ticket, Refusal(413, "Prompt and text need more memory than the cache has; ask for less."))
            return
        try:
            found = self.generator.step()
        except Exception as error:  # as above; which of the texts it was is not known
            for ticket in {id(part.ticket): part.ticket for part in self._jobs.values()}.values():
                self._fail(ticket, error)
            return
        for progress in found:
            is_last = progress.finish is not None
            part = self._jobs.pop(progress.job) if is_last else self._jobs[progress.job]
            problem = _problem(part.work)
            if problem is None:
                self._tell(part, progress, is_last)
            else:
                self._fail(part.ticket, Refusal(422, f"The text could not go on in its form: {problem}."))

    def _admits(self, part: Part) -> bool:
        """Start a text if there is room for it."""
        job = part.work
        assert isinstance(job, Job)
        if part.ticket.is_over:
            return True
        if not self.generator.fits(job):
            return False
        self._start([part])
        try:
            self._jobs[self.generator.add(job)] = part
        except Exception as error:  # as above
            self._fail(part.ticket, error)
        return True

    def _start(self, parts: Sequence[Part]) -> None:
        now = time.monotonic()
        for part in parts:
            part.ticket.started = part.ticket.started or now

    def _tell(self, part: Part, value: object, is_last: bool) -> None:
        self._events.append((part.ticket, Outcome(part.number, value, is_last)))  # type: ignore[arg-type]

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if not ticket.is_over:
            self._events.append((ticket, error))
        ticket.is_over = True
        self._drop(ticket)


def _deliver(events: Sequence[tuple[Ticket, Outcome | Exception]]) -> None:
    for ticket, event in events:
        ticket.put(event)


def _tokens(work: Work) -> int:
    return size_of(work) if isinstance(work, Request) else len(prefix_of(work))


def _problem(work: Work) -> str | None:
    """Why a text's form has ended it."""
    constraint = work.constraint if isinstance(work, Job) else None
    return constraint.problem if isinstance(constraint, GrammarConstraint) else None
