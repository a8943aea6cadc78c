"""Parts of requests that wait for the engine, and who of them is next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from limbeck.serve.schedule import order
from limbeck.serve.ticket import Ticket, Work

WINDOW = 256
"""Parts that are looked at for a round; a request has at most TICKET_PARTS among them, whatever it asks for."""
TICKET_PARTS = 64


class Part(NamedTuple):
    """A part of a ticket that waits."""

    ticket: Ticket
    number: int
    keys: list[bytes]
    """Of the blocks of its prefix."""

    @property
    def work(self) -> Work:
        return self.ticket.parts[self.number]

    def belongs(self, ticket: Ticket, number: int | None) -> bool:
        """Whether it is that part of the ticket; None stands for any."""
        return self.ticket is ticket and number in (None, self.number)


class Line:
    """Parts in order of arrival. The engine's thread only."""

    def __init__(self, is_cached: Callable[[bytes], bool], k: int | None) -> None:
        self.parts: list[Part] = []
        self._is_cached, self._k, self._picked = is_cached, k, 0

    def take(
        self, has_room: Callable[[Part], bool], is_its_turn: Callable[[Part], bool] = lambda part: True
    ) -> list[Part]:
        """Take parts out by k-LPM, up to the first one that there is no room for; those whose turn it is not stay."""
        taken: list[Part] = []
        parts = [part for part in self._window() if is_its_turn(part)]
        for index in order([part.keys for part in parts], self._is_cached, self._k, self._picked):
            if not is_its_turn(parts[index]):
                continue
            if not has_room(parts[index]):
                break
            taken.append(parts[index])
        self._picked += len(taken)
        gone = {id(part) for part in taken}
        self.parts = [part for part in self.parts if id(part) not in gone]
        return taken

    def _window(self) -> list[Part]:
        seen: Counter[int] = Counter()
        window: list[Part] = []
        for part in self.parts:
            seen[id(part.ticket)] += 1
            if seen[id(part.ticket)] <= TICKET_PARTS:
                window.append(part)
                if len(window) == WINDOW:
                    break
        return window

    def drop(self, ticket: Ticket, number: int | None) -> None:
        """Take out a part of a ticket; None stands for all of them."""
        self.parts = [part for part in self.parts if not part.belongs(ticket, number)]
