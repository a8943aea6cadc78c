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

from limbeck.engine.constraints import GrammarConstraint
from limbeck.engine.generation import Generator
from limbeck.engine.isolation import Stalled, apart
from limbeck.engine.jobs import Job
from limbeck.engine.requests import Request
from limbeck.engine.scoring import Scorer
from limbeck.serve.config import ServeConfig
from limbeck.serve.line import Line, Part
from limbeck.serve.long import LongEmbedding, LongRequest, size_of
from limbeck.serve.pins import Pins
from limbeck.serve.ticket import Embed, Outcome, Prefill, Refusal, Ticket, Work, prefix_of

IDLE_SECONDS = 1.0
"""How often an idle engine looks for pins that have run out."""
STALL_SECONDS = 60.0
"""A round that takes longer is told by /health, and nobody is let in behind it."""
PIECES = 4
"""Of a batch: a larger request is scored in pieces of this share, one a round."""
FIRST_TEXTS = 4
"""One place in so many is for requests of which no text is under way, so that many texts of one hold up nobody."""


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
        self._long: deque[LongRequest | LongEmbedding] = deque()
        """Scoring requests larger than a batch and texts to embed, in turns."""
        self._pins = Pins(scorer, config.limits)
        self._events: list[tuple[Ticket, Outcome | Exception]] = []
        self._is_full = False
        """Nothing runs, and what waits has no room beside what is pinned."""
        self._is_stopped = False
        self._round_began: float | None = None

    @property
    def problem(self) -> str | None:
        """Why it answers nobody; None where it works. For any thread."""
        began = self._round_began
        seconds = 0.0 if began is None else time.monotonic() - began
        if not self.is_alive():
            return "The engine has ended; see the server's log."
        return f"The engine has been at one step for {seconds:.0f} s." if seconds > STALL_SECONDS else None

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
        self._inbox.put(lambda: self._pins.release(name))

    def stop(self) -> None:
        """End the thread after the round under way."""
        self._inbox.put(self._end)

    def run(self) -> None:
        while not self._is_stopped:
            self._read_inbox()
            self._round_began = time.monotonic()
            self._let_go()
            self._score()
            self._go_on()
            self._generate()
            if self._events:
                events, self._events = self._events, []
                self._loop.call_soon_threadsafe(_deliver, events)
            self._round_began = None

    def _read_inbox(self) -> None:
        is_idle = not (self._to_score.parts or self._jobs or self._long)
        is_idle = is_idle and (self._is_full or not self._to_generate.parts)
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

    def _end(self) -> None:
        self._is_stopped = True

    def _let_go(self) -> None:
        """End pins and tickets whose time is over."""
        now = time.monotonic()
        self._pins.expire(now)
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

        requests = self._sorted(self._to_score.take(has_room))
        try:
            found = dict(enumerate(self.scorer.score([request for _, request in requests]) if requests else ()))
        except Exception:  # of one of them, maybe: asked for again in halves
            found = apart(
                range(len(requests)),
                lambda numbers: dict(zip(numbers, self.scorer.score([requests[n][1] for n in numbers]), strict=True)),
                lambda number, error: self._fail(requests[number][0].ticket, error),
            )
        for number, scores in found.items():
            self._tell(requests[number][0], scores, True)

    def _sorted(self, parts: list[Part]) -> list[tuple[Part, Request]]:
        """Those that are scored in one batch; of the others, prefixes are pinned, and long ones wait for their turn."""
        self._start(parts)
        requests: list[tuple[Part, Request]] = []
        piece = self.config.batch_tokens // PIECES
        for part in parts:
            if isinstance(part.work, Embed):
                self._long.append(LongEmbedding(part, part.work, self.scorer.decoder, piece))
            elif _tokens(part.work) > self.config.batch_tokens:
                self._long.append(LongRequest(part, self.scorer, piece))
            elif isinstance(part.work, Prefill):
                self._prefill(part, part.work)
            elif isinstance(part.work, Request):
                requests.append((part, part.work))
        return requests

    def _go_on(self) -> None:
        """A piece of the large request whose turn it is."""
        if not self._long:
            return
        long = self._long.popleft()
        try:
            scores = long.step()
        except Exception as error:  # whatever it is, it ends the request that caused it and not the engine
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
            self._tell(part, self._pins.add(work), True)
        except Exception as error:  # as above
            self._fail(part.ticket, error)

    def _generate(self) -> None:
        self._to_generate.take(self._admits, self._may_begin)
        self._is_full = not self._jobs
        if not self._jobs:
            return
        failures: dict[int, Exception] = {}
        try:
            found = self.generator.step(failures.__setitem__)
        except Exception as error:  # not of one text
            found, failures = [], dict.fromkeys(self._jobs, error)
        for job, problem in failures.items():
            if job in self._jobs:  # else another text of its request has ended it
                self._end_text(self._jobs.pop(job), problem)
        for progress in found:
            if progress.job not in self._jobs:  # as above
                continue
            is_last = progress.finish is not None
            part = self._jobs.pop(progress.job) if is_last else self._jobs[progress.job]
            told = _problem(part.work)
            if told is None:
                self._tell(part, progress, is_last)
            else:
                self._fail(part.ticket, Refusal(422, f"The text could not go on in its form: {told}."))

    def _end_text(self, part: Part, error: Exception) -> None:
        """A text could not go on; its request is over."""
        is_stalled = isinstance(error, Stalled)
        self._fail(part.ticket, Refusal(422, f"The text has stalled in its form: {error}.") if is_stalled else error)

    def _may_begin(self, part: Part) -> bool:
        """Whether a text may have one of the last places."""
        places = self.generator.config.max_running
        is_crowded = len(self._jobs) >= places - places // FIRST_TEXTS
        return not (is_crowded and any(other.ticket is part.ticket for other in self._jobs.values()))

    def _admits(self, part: Part) -> bool:
        """Start a text if there is room for it."""
        job = part.work
        assert isinstance(job, Job)
        if part.ticket.is_over:
            return True
        try:
            number = self.generator.begin(job)
        except Exception as error:  # as above
            self._fail(part.ticket, error)
            return True
        if number is None:
            return False
        self._start([part])
        self._jobs[number] = part
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
