"""What is ranked: a request of one member at one moment, its candidates, and what the member did before."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from limbeck.config import checked
from limbeck.errors import ConfigError, DataError

Features = Mapping[str, str]
"""Names and values as they are shown; the order is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interaction:
    """A member met an item: a candidate of a request, or an event of its history."""

    item_id: str
    item: Features
    label: bool
    """Whether the member took the item (clicked, liked)."""
    time: float
    """When, in any unit that grows."""
    probability: float | None = None
    """P(label = yes) where it is known, as in generated data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The candidates that a member is shown at one moment.

    Raises: DataError when the history reaches into the request or a candidate was met before it.
    """

    request_id: str
    member_id: str
    member: Features
    time: float
    history: tuple[Interaction, ...]
    """Oldest first, all of it before `time`."""
    candidates: tuple[Interaction, ...]
    """At least one, none before `time`."""

    def __post_init__(self) -> None:
        if not self.candidates:
            raise DataError(f"request {self.request_id}: no candidates; a request ranks at least one item.")
        if any(event.time >= self.time for event in self.history):
            raise DataError(
                f"request {self.request_id}: its history holds an event at or after its time {self.time:g}; a history "
                "may hold only what was known when the request came."
            )
        if any(candidate.time < self.time for candidate in self.candidates):
            raise DataError(f"request {self.request_id}: a candidate is older than its time {self.time:g}.")

    @property
    def end(self) -> float:
        """When the last of its labels became known."""
        return max(candidate.time for candidate in self.candidates)


@checked
class GroupingConfig:
    """How a log of interactions becomes requests."""

    candidates: int = 10
    """Candidates of a request: consecutive interactions of a member; not used where the log names its requests."""
    min_candidates: int = 2
    """Requests with fewer are left out."""
    history: int = 20
    """Most events of a history, the latest ones."""
    min_history: int = 1
    """Requests with fewer events before them are left out."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_candidates <= self.candidates:
            raise ConfigError(
                f"min_candidates must be in 1 to candidates ({self.candidates}); found {self.min_candidates}"
            )
        if not 0 <= self.min_history <= self.history:
            raise ConfigError(f"min_history must be in 0 to history ({self.history}); found {self.min_history}")


class LogRow(NamedTuple):
    """One line of an interaction log."""

    member_id: str
    interaction: Interaction
    request_id: str | None = None


def group_log(
    rows: Sequence[LogRow], members: Mapping[str, Features], config: GroupingConfig
) -> tuple[list[Request], dict[str, int]]:
    """Requests of an interaction log, and counts of what became of its rows.

    A member's rows are sorted by time, ties in the order of the log. Rows of one request id are one request; without
    ids, each run of `config.candidates` rows is. The time of a request is that of its first row, and its history is
    what the member did strictly before, so that rows of the same second never see one another's labels.
    """
    by_member: dict[str, list[LogRow]] = {}
    for row in rows:
        by_member.setdefault(row.member_id, []).append(row)
    requests: list[Request] = []
    counts = {"rows": len(rows), "rows_of_small_requests": 0, "rows_without_history": 0}
    for member_id, own in by_member.items():
        own.sort(key=lambda row: row.interaction.time)
        past, times = [row.interaction for row in own], [row.interaction.time for row in own]
        for number, group in enumerate(_groups(own, config.candidates)):
            time = group[0].interaction.time
            before = bisect_left(times, time)
            history = past[max(0, before - config.history) : before]
            if len(group) < config.min_candidates:
                counts["rows_of_small_requests"] += len(group)
            elif len(history) < config.min_history:
                counts["rows_without_history"] += len(group)
            else:
                requests.append(
                    Request(
                        request_id=group[0].request_id or f"{member_id}:{number}",
                        member_id=member_id,
                        member=members.get(member_id, {}),
                        time=time,
                        history=tuple(history),
                        candidates=tuple(row.interaction for row in group),
                    )
                )
    return _with_own_ids(requests), counts


def _with_own_ids(requests: list[Request]) -> list[Request]:
    """Ids that count within a member, such as those of sessions, get the member's in front: an id is one request's."""
    if len({request.request_id for request in requests}) == len(requests):
        return requests
    return [replace(request, request_id=f"{request.member_id}:{request.request_id}") for request in requests]


def _groups(rows: list[LogRow], size: int) -> list[list[LogRow]]:
    if all(row.request_id is None for row in rows):
        return [rows[i : i + size] for i in range(0, len(rows), size)]
    groups: dict[str | None, list[LogRow]] = {}
    for row in rows:
        groups.setdefault(row.request_id, []).append(row)
    return list(groups.values())


@checked
class SplitConfig:
    """Which requests train and which measure: the first in time train, the last test."""

    validation_fraction: float = 0.1
    """Share of the requests, before the test's, that validate."""
    test_fraction: float = 0.2
    """Share of the requests, the latest, that test."""

    def __post_init__(self) -> None:
        held_out = (self.validation_fraction, self.test_fraction)
        if min(held_out) < 0 or sum(held_out) >= 1:
            raise ConfigError(
                f"validation_fraction {held_out[0]} and test_fraction {held_out[1]}: expected 0 or more, less than 1 "
                "together"
            )


class Split(NamedTuple):
    """Requests by their use; every label of one part was known before the first request of the next."""

    train: list[Request]
    validation: list[Request]
    test: list[Request]
    straddling: int
    """Requests left out because their labels became known only after the next part had begun."""


def split_by_time(requests: Sequence[Request], config: SplitConfig) -> Split:
    """Cut a set of requests at two moments.

    Raises: DataError when the training part is empty, or a part that was asked for is.
    """
    ordered = sorted(requests, key=lambda request: (request.time, request.request_id))
    test_start = len(ordered) - round(config.test_fraction * len(ordered))
    validation_start = test_start - round(config.validation_fraction * len(ordered))
    cuts = [ordered[i].time if i < len(ordered) else float("inf") for i in (validation_start, test_start)]
    parts: tuple[list[Request], list[Request], list[Request]] = ([], [], [])
    straddling = 0
    for request in ordered:
        part = sum(request.time >= cut for cut in cuts)
        if part < 2 and request.end >= cuts[part]:
            straddling += 1
        else:
            parts[part].append(request)
    asked = (1.0, config.validation_fraction, config.test_fraction)
    for name, members, share in zip(("training", "validation", "test"), parts, asked, strict=True):
        if share and not members:
            raise DataError(
                f"the {name} part of {len(ordered)} requests is empty ({straddling} lie across a cut); take more "
                "requests, or smaller fractions."
            )
    return Split(*parts, straddling)
