"""Trace files on disk to records, each with the place it came from: JSON lines, JSON lists and Parquet.

A line that is no JSON is handed on as a bad record; a file that cannot be read at all raises.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from limbeck.errors import TraceFormatError

SUFFIXES = (".jsonl", ".json", ".parquet")
_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)(?=[-_.]|$)")
_BATCH_ROWS = 64


class Located(NamedTuple):
    """One record of a source."""

    where: str
    """`path:line`, or `path:row N`, counted from 1."""
    file: str
    """The file, or whatever shares one format."""
    record: Any
    problem: str | None = None
    """Why there is no record."""


def read_file(path: Path) -> Iterator[Located]:
    """The records of one file.

    Raises: TraceFormatError for an unknown suffix, a damaged file, or one without records.
    """
    if path.suffix not in SUFFIXES:
        found = repr(path.suffix) if path.suffix else "no suffix"
        raise TraceFormatError(f"{path}: unknown kind of file, {found}; accepted are {', '.join(SUFFIXES)}.")
    empty = True
    try:
        for located in _records(path):
            empty = False
            yield located
    except OSError as error:
        raise TraceFormatError(f"{path}: cannot be read: {error.strerror or _one_line(error)}.") from error
    if empty:
        raise TraceFormatError(f"{path}: the file holds no records; expected one a line or row.")


def trace_files(directory: Path, split: str | None) -> list[Path]:
    """The JSON-lines and Parquet files of `directory`, those of one split when their names tell several.

    Raises: TraceFormatError when there is none, or none of `split`.
    """
    found = sorted(path for path in directory.rglob("*") if path.suffix in (".jsonl", ".parquet") and path.is_file())
    files = [path for path in found if not _is_hidden(path.relative_to(directory))]
    if not files:
        raise TraceFormatError(
            f"{directory}: the directory holds no trace files; expected .jsonl or .parquet files, or what "
            "datasets.save_to_disk wrote."
        )
    splits = {path: _split_of(path.relative_to(directory)) for path in files}
    named = sorted({name for name in splits.values() if name})
    if split is None and len(named) <= 1:
        return files
    wanted = choose_split(named, split, str(directory))
    return [path for path in files if splits[path] == wanted]


def choose_split(available: list[str], wanted: str | None, where: str) -> str:
    """The split asked for; without a wish `train`, or the only one.

    Raises: TraceFormatError when the choice is open or the wish is not there.
    """
    if wanted is None and len(available) == 1:
        return available[0]
    chosen = wanted or "train"
    if chosen in available:
        return chosen
    known = ", ".join(available) or "none"
    raise TraceFormatError(f"{where}: there is no split {chosen!r}; the splits are {known}: set split to one of them.")


def _records(path: Path) -> Iterator[Located]:
    if path.stat().st_size == 0:
        return iter(())
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".json" and _first_byte(path) == b"[":
        return _read_json_list(path)
    return _read_lines(path)


def _read_lines(path: Path) -> Iterator[Located]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                yield _decode_line(content, f"{path}:{number}", str(path))


def _decode_line(line: bytes, where: str, file: str) -> Located:
    try:
        return Located(where, file, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Located(where, file, None, f"not UTF-8: byte {error.start + 1} of the line, {error.reason}")
    except json.JSONDecodeError as error:
        if not line.endswith(b"\n"):
            return Located(where, file, None, f"cut off: the last line is not whole JSON, {error.msg}")
        return Located(where, file, None, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return Located(where, file, None, f"not JSON: {str(error)[:80]}")


def _read_json_list(path: Path) -> Iterator[Located]:
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TraceFormatError(f"{path}: not UTF-8: byte {error.start + 1}, {error.reason}.") from error
    except json.JSONDecodeError as error:
        raise TraceFormatError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}; expected a list."
        ) from error
    except (ValueError, RecursionError) as error:
        raise TraceFormatError(f"{path}: not JSON: {str(error)[:80]}.") from error
    for number, record in enumerate(records, start=1):
        yield Located(f"{path}:record {number}", str(path), record)


def _read_parquet(path: Path) -> Iterator[Located]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield Located(f"{path}:row {number}", str(path), record)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, TraceFormatError):
            raise
        raise TraceFormatError(f"{path}: damaged Parquet file: {_one_line(error)}; write it anew.") from error


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _split_of(relative: Path) -> str | None:
    """The split that the name of a file or of its folder tells, as in `data/train-00000-of-00002.parquet`."""
    matches = [_SPLIT_NAME.match(part) for part in (relative.name, *relative.parts[:-1])]
    return next((match.group(1) for match in matches if match), None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160].rstrip(".")
