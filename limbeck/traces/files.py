"""Trace files on disk to records, each with the place it came from: JSON in its containers, and Parquet.

A line that is no JSON is handed on as a bad record; a file that cannot be read at all raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from limbeck.errors import TraceFormatError
from limbeck.traces.containers import DAMAGED, OPENERS, read_json

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
COMPRESSIONS = tuple(suffix for suffix in OPENERS if suffix)
_BATCH_ROWS = 64


class Located(NamedTuple):
    """One record of a source."""

    where: str
    """`path:line`, or `path:row N`, counted from 1."""
    record: Any
    problem: str | None = None
    """Why there is no record."""


def kind_of(path: Path) -> tuple[str, str] | None:
    """Kind (one of SUFFIXES) and compression of a file by its name; None for another kind. Case is no matter."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    kind = suffixes[-1] if suffixes else ""
    is_known = kind in JSON_SUFFIXES or (kind == ".parquet" and not compression)
    return (kind, compression) if is_known else None


def read_file(path: Path) -> Iterator[Located]:
    """The records of one file.

    Raises: TraceFormatError for an unknown suffix, a damaged file, or one without records.
    """
    kind = kind_of(path)
    if kind is None:
        found = repr("".join(path.suffixes[-2:])) if path.suffix else "no suffix"
        raise TraceFormatError(
            f"{path}: unknown kind of file, {found}; accepted are {', '.join(SUFFIXES)}, and JSON with "
            f"{', '.join(COMPRESSIONS)} behind."
        )
    empty = True
    try:
        if path.stat().st_size:
            for located in _read_parquet(path) if kind[0] == ".parquet" else _read_json(path, kind[1]):
                empty = False
                yield located
    except DAMAGED as error:
        raise TraceFormatError(f"{path}: damaged: {_one_line(error)}; write it anew.") from error
    except OSError as error:
        raise TraceFormatError(f"{path}: cannot be read: {error.strerror or _one_line(error)}.") from error
    if empty:
        raise TraceFormatError(f"{path}: the file holds no records; expected one a line or row.")


def _read_json(path: Path, compression: str) -> Iterator[Located]:
    for place, value, problem in read_json(path, compression):
        yield Located(f"{path}:{place}", value, problem)


def _read_parquet(path: Path) -> Iterator[Located]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield Located(f"{path}:row {number}", record)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, TraceFormatError):
            raise
        raise TraceFormatError(f"{path}: damaged Parquet file: {_one_line(error)}; write it anew.") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
