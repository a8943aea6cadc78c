"""Requests as arrays of numbers: what rates, factors and trees read, which know no text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from limbeck.ranking.interaction import Request
from limbeck.ranking.request import LogRequests


class Arrays(NamedTuple):
    """R requests with M candidates and H events of histories in all."""

    items: np.ndarray
    """int [M]: number of the item."""
    labels: np.ndarray
    """bool [M]."""
    grades: np.ndarray
    """float [M]."""
    owners: np.ndarray
    """int [M]: number of the request, rising from 0."""
    members: np.ndarray
    """int [R]."""
    past: np.ndarray
    """int [H]: number of the item."""
    past_labels: np.ndarray
    """bool [H]."""
    past_owners: np.ndarray
    """int [H]: number of the request, rising."""
    own_shown: np.ndarray
    """int [R]: how many labels of the member were known when the request came, shown in the history or not."""
    own_yes: np.ndarray
    """int [R]: how many of them were a yes."""

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.members)

    def part(self, start: int, end: int) -> Arrays:
        """The requests from `start` to `end` - 1, numbered from 0."""
        rows = slice(*np.searchsorted(self.owners, [start, end]))
        events = slice(*np.searchsorted(self.past_owners, [start, end]))
        return Arrays(
            items=self.items[rows],
            labels=self.labels[rows],
            grades=self.grades[rows],
            owners=self.owners[rows] - start,
            members=self.members[start:end],
            past=self.past[events],
            past_labels=self.past_labels[events],
            past_owners=self.past_owners[events] - start,
            own_shown=self.own_shown[start:end],
            own_yes=self.own_yes[start:end],
        )


def arrays_of(parts: Sequence[Sequence[Request]]) -> tuple[list[Arrays], int]:
    """Each part as arrays, members and items numbered alike in all of them, and the number of items."""
    if all(isinstance(part, LogRequests) for part in parts):
        logs = [part for part in parts if isinstance(part, LogRequests)]
        return [_of_log(part) for part in logs], len(logs[0].log.item.values)
    items: dict[str, int] = {}
    members: dict[str, int] = {}
    return [_of_list(part, items, members) for part in parts], len(items)


def _of_log(requests: LogRequests) -> Arrays:
    log, rows = requests.log, requests.rows
    past, past_owners = requests.past
    return Arrays(
        log.item.codes[rows],
        log.label[rows],
        log.label[rows].astype(np.float32) if log.grade is None else log.grade[rows],
        requests.owners,
        log.member.codes[requests.first_rows],
        log.item.codes[past],
        log.label[past],
        past_owners,
        *requests.own_counts,
    )


def _of_list(requests: Sequence[Request], items: dict[str, int], members: dict[str, int]) -> Arrays:
    def numbers(names: Iterable[str], known: dict[str, int]) -> np.ndarray:
        return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)

    shown = [candidate for request in requests for candidate in request.candidates]
    past = [event for request in requests for event in request.history]
    return Arrays(
        numbers((candidate.item_id for candidate in shown), items),
        np.array([candidate.label for candidate in shown], dtype=bool),
        np.array([c.label if c.grade is None else c.grade for c in shown], dtype=np.float32),
        np.repeat(np.arange(len(requests)), [len(request.candidates) for request in requests]),
        numbers((request.member_id for request in requests), members),
        numbers((event.item_id for event in past), items),
        np.array([event.label for event in past], dtype=bool),
        np.repeat(np.arange(len(requests)), [len(request.history) for request in requests]),
        np.array([len(request.history) for request in requests]),
        np.array([sum(event.label for event in request.history) for request in requests]),
    )
