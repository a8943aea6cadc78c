"""What a table may give away: told before a model is trained, never mended in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from limbeck.errors import DataError
from limbeck.ranking.log import Coded, Log
from limbeck.ranking.request import LogRequests, Request
from limbeck.ranking.split import Split


def leaks(split: Split) -> tuple[list[str], dict[str, int]]:
    """Notes for people, and counts for the manifest, on the parts of a log.

    Told are features that tell the label of all training rows, which may be known only after it; features of member or
    context that change within a request; and what of the test part training saw: items, pairs of member and item,
    queries.

    Raises: DataError for requests whose rows have several queries.
    """
    train, test = split.train, split.test
    if not isinstance(train, LogRequests):
        return [], {}
    notes = [
        f"{name} tells the label of all {len(train.rows)} training rows; is it known before the label?"
        for name, column in _columns(train.log)
        if tells_label(column.codes[train.rows], train.log.label[train.rows])
    ]
    _refuse_several_queries(train)
    for name, column in {**train.log.of_member, **train.log.of_context}.items():
        count = int(changes(train, column).sum())
        if count:
            notes.append(f"{name} changes within {count} of {len(train)} training requests; its least value is read")
    counts = seen_in_training(train, test)
    if len(test):
        told = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items())
        notes.append(f"of the test part: {told}")
    return notes, counts


def tells_label(codes: np.ndarray, labels: np.ndarray) -> bool:
    """Whether no value stands beside both labels, though values are repeated (at most half as many as rows).

    Args:
      codes: int [N], the value of each row.
      labels: bool [N].
    """
    values = len(np.unique(codes))
    pairs = len(np.unique(2 * codes.astype(np.int64) + labels))
    return bool(labels.any() and not labels.all() and values == pairs and 2 * values <= len(codes))


def changes(requests: LogRequests, column: Coded) -> np.ndarray:
    """bool [R]: whether the rows of a request have several values."""
    if not len(requests):
        return np.zeros(0, dtype=bool)
    codes, starts = column.codes[requests.rows], np.cumsum(requests.sizes) - requests.sizes
    return np.minimum.reduceat(codes, starts) != np.maximum.reduceat(codes, starts)


def seen_in_training(train: LogRequests, test: Sequence[Request]) -> dict[str, int]:
    """How many of the test part's items, of its rows' pairs of member and item, and of its queries training had."""
    if not isinstance(test, LogRequests) or not len(test):
        return {}
    log, rows, ours = train.log, train.rows, test.rows
    items = np.unique(log.item.codes[ours])
    known = {
        "test_items": len(items),
        "test_items_seen_in_training": int(np.isin(items, log.item.codes[rows]).sum()),
        "test_pairs_seen_in_training": int(np.isin(_pairs(log, ours), _pairs(log, rows)).sum()),
    }
    if log.query is not None:
        queries = np.unique(log.query.codes[ours])
        known["test_queries_seen_in_training"] = int(np.isin(queries, log.query.codes[rows]).sum())
    return known


def _pairs(log: Log, rows: np.ndarray) -> np.ndarray:
    return log.member.codes[rows].astype(np.int64) * len(log.item.values) + log.item.codes[rows]


def _columns(log: Log) -> Iterator[tuple[str, Coded]]:
    kinds: Mapping[str, Mapping[str, Coded]] = {"member": log.of_member, "context": log.of_context, "item": log.of_item}
    for kind, columns in kinds.items():
        yield from ((f"{kind} feature {name!r}", column) for name, column in columns.items())


def _refuse_several_queries(requests: LogRequests) -> None:
    column = requests.log.query
    if column is not None and (several := changes(requests, column)).any():
        index = int(np.flatnonzero(several)[0])
        raise DataError(
            f"request {requests.id_of(index)}: its rows have several queries; a request has one (fields.request_id)."
        )
