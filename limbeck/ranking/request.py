"""Requests of an interaction log, each made when it is read: 5 million rows stay the columns that they are.

Each row has its own member, item and context columns, so a request reads what was true at its own moment and never what
another row says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np

from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.ranking.interaction import Features, Interaction, LogRow, Request
from limbeck.ranking.log import Columns, Log

__all__ = ["GroupingConfig", "Interaction", "LogRequests", "LogRow", "Request", "group_log"]


@checked
class GroupingConfig:
    """How a log of interactions becomes requests."""

    candidates: int = 10
    """Candidates of a request: consecutive interactions of a member; not used where the log names its requests."""
    min_candidates: int = 2
    """Requests with fewer are left out."""
    history: int = 20
    """Most events of a history, the latest ones."""
    min_history: int | None = None
    """Requests with fewer events before them are left out; null: 0 where requests have a query, else 1."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_candidates <= self.candidates:
            raise ConfigError(
                f"min_candidates must be in 1 to candidates ({self.candidates}); found {self.min_candidates}"
            )
        if not 0 <= (self.min_history or 0) <= self.history:
            raise ConfigError(f"min_history must be in 0 to history ({self.history}); found {self.min_history}")


class LogRequests(Sequence[Request]):
    """The requests of a log; a slice is one of fewer requests."""

    def __init__(self, log: Log, rows: np.ndarray, past: np.ndarray, requests: np.ndarray, has_own_ids: bool) -> None:
        self.log = log
        self._rows, self._past, self._requests, self._has_own_ids = rows, past, requests, has_own_ids

    def __len__(self) -> int:
        return len(self._requests)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> LogRequests: ...
    def __getitem__(self, index: int | slice) -> Request | LogRequests:
        return self.take(np.arange(len(self))[index]) if isinstance(index, slice) else self._request(index)

    def take(self, chosen: np.ndarray) -> LogRequests:
        """Some requests, by number."""
        return LogRequests(self.log, self._rows, self._past, self._requests[chosen], self._has_own_ids)

    def over(self, log: Log) -> LogRequests:
        """The same requests of a log with other columns."""
        return LogRequests(log, self._rows, self._past, self._requests, self._has_own_ids)

    @property
    def times(self) -> np.ndarray:
        """float64 [R]: when each was made."""
        return self.log.time[self._rows[self._requests["first"]]]

    @property
    def ends(self) -> np.ndarray:
        """float64 [R]: when the last label of each became known."""
        return self.log.time[self._rows[self._requests["last"] - 1]]

    @property
    def first_rows(self) -> np.ndarray:
        """int [R]: the row of the log that each begins with."""
        return self._rows[self._requests["first"]]

    @property
    def sizes(self) -> np.ndarray:
        """int [R]: the number of candidates of each."""
        return self._requests["last"] - self._requests["first"]

    @property
    def rows(self) -> np.ndarray:
        """int [M]: the rows of the log that are candidates, request after request."""
        return self._rows[_spans(self._requests["first"], self._requests["last"])]

    @property
    def owners(self) -> np.ndarray:
        """int [M]: the number of the request of each of `rows`."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @property
    def past(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of all histories, request after request, and the number of the request of each."""
        first, last = self._requests["past_first"], self._requests["past_last"]
        return self._past[_spans(first, last)], np.repeat(np.arange(len(self)), last - first)

    @property
    def own_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """How many rows the member had before each request, and how many of them were a yes: int [R] each."""
        first, last = self._requests["own_first"], self._requests["past_last"]
        before = np.concatenate([[0], np.cumsum(self.log.label[self._past])])
        return last - first, before[last] - before[first]

    def id_of(self, index: int) -> str:
        """The id of a request: the log's own, with the member's in front where several requests share one."""
        first = int(self._rows[self._requests["first"][index]])
        if self.log.request is None:
            return f"{self.log.member.text(first)}:{self._requests['number'][index]}"
        own = self.log.request.text(first)
        return str(own) if self._has_own_ids else f"{self.log.member.text(first)}:{own}"

    def _request(self, index: int) -> Request:
        log, place = self.log, self._requests[index]
        rows = self._rows[place["first"] : place["last"]]
        at_once = rows[log.time[rows] == log.time[rows[0]]]
        return Request(
            request_id=self.id_of(index),
            member_id=log.member.text(rows[0]) or "",
            member=_of_moment(log.of_member, at_once),
            time=float(log.time[rows[0]]),
            history=tuple(map(log.interaction, self._past[place["past_first"] : place["past_last"]].tolist())),
            candidates=tuple(map(log.candidate, rows.tolist())),
            query=(log.query.text(rows[0]) or "") if log.query is not None else "",
            context=_of_moment(log.of_context, at_once),
        )


_PLACE = np.dtype([(name, np.int64) for name in ("first", "last", "past_first", "past_last", "own_first", "number")])
"""Of a request: its rows, its history's, the member's first row, and its number among the member's requests."""


def group_log(
    rows: Sequence[LogRow], members: Mapping[str, Features], config: GroupingConfig
) -> tuple[LogRequests, dict[str, int]]:
    """Requests of an interaction log, and counts of what became of its rows.

    A member's rows are sorted by time. Rows of one request id are one request; without ids, each run of
    `config.candidates` rows is. The time of a request is that of its first row, and its history is what the member did
    strictly before, so that rows of the same second never see one another's labels. Features of member and context are
    those of the request's own rows; where rows of its first moment differ, the least value counts (a counter before it
    grew), whatever the order of the file.

    Args:
      rows: a `Log`, or a list in the order of the log.
      members: features of members that stand beside the log, by id.
    """
    log = (rows if isinstance(rows, Log) else Log.of(rows)).joined(members)
    counts = {"rows": len(log), "rows_of_small_requests": 0, "rows_without_history": 0}
    order = np.lexsort((log.tie, log.time, log.member.codes)).astype(np.int32)
    member, time = log.member.codes[order], log.time[order]
    is_first = np.diff(member, prepend=-1) != 0
    own_first = _last_true(is_first)
    moment_first = _last_true(is_first | (np.diff(time, prepend=np.nan) != 0))
    position = np.arange(len(order), dtype=np.int32) - own_first
    group, number, has_own_ids = _groups(log, order, position, config.candidates)
    sizes, places = np.bincount(group), np.argsort(group, kind="stable").astype(np.int32)
    firsts = np.cumsum(sizes) - sizes
    at = places[firsts]
    requests = np.zeros(len(sizes), dtype=_PLACE)
    requests["first"], requests["last"] = firsts, firsts + sizes
    requests["past_last"] = moment_first[at]
    requests["past_first"] = np.maximum(own_first[at], moment_first[at] - config.history)
    requests["own_first"], requests["number"] = own_first[at], number[at]
    least = config.min_history if config.min_history is not None else int(log.query is None)
    is_small = sizes < config.min_candidates
    is_new = ~is_small & (moment_first[at] - own_first[at] < least)
    counts |= {"rows_of_small_requests": int(sizes[is_small].sum()), "rows_without_history": int(sizes[is_new].sum())}
    return LogRequests(log, order[places], order, requests[~is_small & ~is_new], has_own_ids), counts


def _groups(log: Log, order: np.ndarray, position: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Which request each row of the ordered log is of, its number among the member's, and whether ids are unique.

    Args:
      position: int [N], of a row among its member's.
      size: rows of a request, where the log does not name its requests.
    """
    if log.request is None:
        return np.cumsum(position % size == 0, dtype=np.int32) - 1, position // size, True
    keys = log.member.codes[order].astype(np.int64)
    keys *= len(log.request.values) + 1
    keys += log.request.codes[order]
    by_key = np.argsort(keys, kind="stable").astype(np.int32)
    is_new = np.diff(keys[by_key], prepend=-1) != 0
    group = np.empty(len(order), dtype=np.int32)
    group[by_key] = np.cumsum(is_new, dtype=np.int32) - 1
    return group, position, int(is_new.sum()) == len(np.unique(log.request.codes))


def _spans(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """int64: all of first[0] to last[0] - 1, then first[1] to last[1] - 1, and so on."""
    sizes = last - first
    return np.repeat(first - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())


def _last_true(flags: np.ndarray) -> np.ndarray:
    """int32 [N]: for each place the last one up to it whose flag is set; the first one's is."""
    return np.maximum.accumulate(np.where(flags, np.arange(len(flags), dtype=np.int32), 0))


def _of_moment(columns: Columns, rows: np.ndarray) -> Features:
    """Features of a request whose first moment has these rows."""
    found = {}
    for name, column in columns.items():
        values = {value for row in rows.tolist() if (value := column.text(row)) is not None}
        if values:
            found[name] = min(values, key=_number_then_text)
    return found


def _number_then_text(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return np.inf, value
