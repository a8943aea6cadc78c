"""Which requests train, validate and test: by time, or with whole members or queries held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from limbeck.config import checked
from limbeck.errors import ConfigError, DataError
from limbeck.ranking.log import Log
from limbeck.ranking.request import LogRequests, Request


@checked
class SplitConfig:
    """Which requests train and which measure."""

    by: Literal["time", "member", "query"] | None = None
    """time: the first requests train, the last test; member, query: all requests of one go to the same part. null: the
    parts that the data names itself (BEIR), query for other formats of search, time for logs."""
    validation_fraction: float = 0.1
    """Share of the requests, before the test's, that validate; of members or queries where those are held out."""
    test_fraction: float = 0.2
    """Share of the requests, the latest, that test; of members or queries where those are held out."""
    seed: int = 0
    """Which members or queries are held out; means nothing for time."""

    def __post_init__(self) -> None:
        held_out = (self.validation_fraction, self.test_fraction)
        if min(held_out) < 0 or sum(held_out) >= 1:
            raise ConfigError(
                f"validation_fraction {held_out[0]} and test_fraction {held_out[1]}: expected 0 or more, less than 1 "
                "together"
            )


class Split(NamedTuple):
    """Requests by their use, each part in the order of time."""

    train: Sequence[Request]
    validation: Sequence[Request]
    test: Sequence[Request]
    straddling: int
    """Requests that were under way at a cut in time and are in no part."""

    @property
    def parts(self) -> tuple[Sequence[Request], Sequence[Request], Sequence[Request]]:
        """Train, validation, test."""
        return self.train, self.validation, self.test

    def over(self, log: Log) -> Split:
        """The same requests of a log with other columns."""
        train, validation, test = (part.over(log) for part in self.of_log())
        return Split(train, validation, test, self.straddling)

    def of_log(self) -> list[LogRequests]:
        """The three parts of a log. Raises: ConfigError for requests that are of none."""
        found = [part for part in self.parts if isinstance(part, LogRequests)]
        if len(found) < 3:
            raise ConfigError("these requests are made and not read from a log, which signals and bins are of")
        return found


def split_requests(requests: Sequence[Request], config: SplitConfig) -> Split:
    """The parts that the config asks for; cut in time, all labels of one were known before the next begins.

    Raises: DataError when the training part is empty, or a part that was asked for is.
    """
    times, ends, ids = _moments(requests)
    order = np.array(sorted(range(len(requests)), key=lambda i: (times[i], ids[i])), dtype=np.int64)
    own = requests.log.part if isinstance(requests, LogRequests) and config.by is None else None
    if own is not None and isinstance(requests, LogRequests):
        part = own[requests.first_rows[order]].astype(np.int64)
    elif config.by in (None, "time"):
        part = _by_time(times[order], ends[order], config)
    else:
        part = _by_group([_group(requests, i, str(config.by)) for i in order.tolist()], config)
    chosen = [_take(requests, order[part == number]) for number in range(3)]
    straddling = int((part < 0).sum())
    asked = (1.0, config.validation_fraction, config.test_fraction) if own is None else (1.0, 0.0, 0.0)
    for name, members, share in zip(("training", "validation", "test"), chosen, asked, strict=True):
        if share and not len(members):
            raise DataError(
                f"the {name} part of {len(requests)} requests is empty ({straddling} lie across a cut); take more "
                "requests, or smaller fractions."
            )
    return Split(chosen[0], chosen[1], chosen[2], straddling)


def _by_time(times: np.ndarray, ends: np.ndarray, config: SplitConfig) -> np.ndarray:
    """int [R]: the part of each request in the order of time; -1 for one that lies across a cut."""
    test_start = len(times) - round(config.test_fraction * len(times))
    validation_start = test_start - round(config.validation_fraction * len(times))
    cuts = [times[i] if i < len(times) else np.inf for i in (validation_start, test_start)]
    part = (times >= cuts[0]).astype(np.int64) + (times >= cuts[1])
    next_cut = np.array([*cuts, np.inf])[part]
    return np.where(ends >= next_cut, -1, part)


def _by_group(groups: Sequence[str], config: SplitConfig) -> np.ndarray:
    """int [R]: the part of each request, by a hash of its member or query."""
    place = {name: _uniform(name, config.seed) for name in set(groups)}
    cuts = (config.test_fraction, config.test_fraction + config.validation_fraction)
    return np.array([2 - sum(place[name] >= cut for cut in cuts) for name in groups], dtype=np.int64)


def _uniform(name: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _group(requests: Sequence[Request], index: int, by: str) -> str:
    request = requests[index]
    if by == "query" and not request.query:
        raise ConfigError("data.split.by query: the requests have no query; name its column (data.fields.query)")
    return request.member_id if by == "member" else request.query


def _moments(requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Times, ends and ids."""
    if isinstance(requests, LogRequests):
        return requests.times, requests.ends, [requests.id_of(i) for i in range(len(requests))]
    return (
        np.array([request.time for request in requests]),
        np.array([request.end for request in requests]),
        [request.request_id for request in requests],
    )


def _take(requests: Sequence[Request], chosen: np.ndarray) -> Sequence[Request]:
    return requests.take(chosen) if isinstance(requests, LogRequests) else [requests[i] for i in chosen.tolist()]
