"""A column of a table as numbers, labels, times or texts: whole columns at once, and the row of what cannot be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any, NoReturn

import numpy as np
import pyarrow
import pyarrow.compute

from limbeck.errors import DataError

_YES, _NO = {"true", "yes", "1", "1.0"}, {"false", "no", "0", "0.0"}
A_LABEL = "true or false, 1 or 0, yes or no; or set fields.label_from"
A_NUMBER = "a number"
A_TIME = "a number, a date or an ISO 8601 time"


def texts(column: pyarrow.Array, where: Where) -> pyarrow.Array:
    """A column of any type as texts, null where there is nothing.

    Raises: DataError for bytes that are not UTF-8.
    """
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.cast(pyarrow.string())
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        values = column.to_pylist()
    for row, value in enumerate(values):
        if isinstance(value, bytes) and not _is_utf8(value):
            where.refuse(row, "is not UTF-8; set fields.encoding (latin-1, cp1252), or convert the file")
    return pyarrow.array([None if value is None else _as_text(value) for value in values], pyarrow.string())


def numbers(column: pyarrow.Array, where: Where, what: str = A_NUMBER) -> np.ndarray:
    """float64 [N], all finite. Raises: DataError."""
    values = _cast(column, pyarrow.float64())
    if values is None or values.null_count or not np.isfinite(values.to_numpy(zero_copy_only=False)).all():
        return _one_by_one(column, where, _number, what)
    return values.to_numpy(zero_copy_only=False)


def labels(column: pyarrow.Array, where: Where) -> np.ndarray:
    """bool [N] of true and false, yes and no, 1 and 0. Raises: DataError."""
    coded = texts(column, where).dictionary_encode()
    known = coded.dictionary.to_pylist()
    if coded.null_count or any(not isinstance(_label_or_none(value), bool) for value in known):
        return _one_by_one(column, where, _label, A_LABEL).astype(bool)
    return np.array([_label(value) for value in known], dtype=bool)[coded.indices.to_numpy()]


def times(column: pyarrow.Array, where: Where) -> np.ndarray:
    """float64 [N] seconds (numbers as they are); times without a zone are read as UTC. Raises: DataError."""
    for kind in (pyarrow.float64(), pyarrow.timestamp("us"), pyarrow.timestamp("us", "UTC")):
        values = column if pyarrow.types.is_timestamp(column.type) else _cast(column, kind)
        if values is None or values.null_count:
            continue
        if pyarrow.types.is_timestamp(values.type):
            values = values.cast(pyarrow.timestamp("us", values.type.tz), safe=False)
            return values.cast(pyarrow.int64()).to_numpy() / 1e6
        found = values.to_numpy(zero_copy_only=False)
        if np.isfinite(found).all():
            return found
    return _one_by_one(column, where, _time, A_TIME)


class Where:
    """The place of a column, for what is said of its values."""

    def __init__(self, path: object, first_row: int, name: str) -> None:
        self._path, self._first_row, self._name = path, first_row, name

    def refuse(self, row: int, why: str) -> NoReturn:
        """Raises: DataError that names file, row and column; `row` is counted in this part, from 0."""
        raise DataError(f"{self._path}:row {self._first_row + row}: {self._name} {why}.")


def _cast(column: pyarrow.Array, kind: pyarrow.DataType) -> pyarrow.Array | None:
    try:
        return column.cast(pyarrow.string() if pyarrow.types.is_binary(column.type) else column.type).cast(kind)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        return None


def _one_by_one(column: pyarrow.Array, where: Where, parse: Callable[[Any], float], what: str) -> np.ndarray:
    """The same, slowly: for a value that no cast reads, or its refusal."""
    found = np.empty(len(column))
    for row, value in enumerate(column.to_pylist()):
        read = value.decode(errors="replace") if isinstance(value, bytes) else value
        try:
            found[row] = parse(read)
        except (TypeError, ValueError):
            where.refuse(row, f"is {read!r}; expected {what}")
    return found


def _label_or_none(value: str) -> bool | None:
    try:
        return _label(value)
    except ValueError:
        return None


def _label(value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in _YES | _NO:
        raise ValueError
    return text in _YES


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _time(value: Any) -> float:
    if isinstance(value, str):
        try:
            return _number(value)
        except ValueError:
            value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    return _number(value)


def _as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _is_utf8(value: bytes) -> bool:
    try:
        return value.decode() is not None
    except UnicodeDecodeError:
        return False
