"""Objects that hold records instead of being one: under a key, by key, or a column under each key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Inner(NamedTuple):
    """Records inside an object, and what each is called in the place."""

    names: list[str]
    records: list[Any]
    left_out: list[str]
    """Other lists of objects beside them."""


def inner_records(value: Any) -> Iterator[Inner]:
    """The ways to read an object as records, likeliest first; none for anything else.

    `{"data": [...]}` and others with one list of objects (of several `train`), each perhaps under `row` as the hub's
    server gives them; `{"id": {...}, ...}`; columns, as lists or as objects by row number (pandas).
    """
    if not isinstance(value, Mapping) or not value:
        return
    yield from _in_a_list(value)
    if all(isinstance(entry, Mapping) for entry in value.values()):
        yield Inner([str(key) for key in value], list(value.values()), [])
    yield from _in_columns(value)


def _in_a_list(value: Mapping[Any, Any]) -> Iterator[Inner]:
    """`{"data": [...]}`."""
    lists = {str(key): entry for key, entry in value.items() if _are_objects(entry)}
    if len(lists) == 1 or "train" in lists:
        name = "train" if "train" in lists else next(iter(lists))
        rows = [_row(entry) for entry in lists.pop(name)]
        yield Inner([f"{name}[{number}]" for number in range(len(rows))], rows, list(lists))


def _in_columns(value: Mapping[Any, Any]) -> Iterator[Inner]:
    """Columns, as lists or as objects by row number."""
    columns = {key: _column(entry) for key, entry in value.items()}
    lengths = {None if column is None else len(column) for column in columns.values()}
    if len(lengths) == 1 and None not in lengths and lengths != {0}:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        yield Inner([f"row {number}" for number in range(1, len(rows) + 1)], rows, [])


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _row(entry: Mapping[str, Any]) -> Any:
    return entry["row"] if isinstance(entry.get("row"), Mapping) else entry


def _column(value: Any) -> list[Any] | None:
    if isinstance(value, Mapping) and all(str(key).isdigit() for key in value):
        return list(value.values())
    return value if isinstance(value, list) else None
