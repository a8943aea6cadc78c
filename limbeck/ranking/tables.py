"""An interaction log in Parquet or CSV files of any columns: a mapping says what they are.

A file is read a block at a time, and of each block only the columns that are named, as the text that they are: 007 is
not 7, and twenty digits are no float. What a large text file was parsed to is kept as Parquet beside other caches
(~/.cache/limbeck/tables), by the file's size and time, and read from there the next time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from limbeck.config import checked, to_dict
from limbeck.errors import ConfigError, DataError, nearest
from limbeck.progress import bar, say
from limbeck.ranking import columns
from limbeck.ranking.interaction import NO_FEATURES, Features
from limbeck.ranking.kept import keep
from limbeck.ranking.log import Coded, Log
from limbeck.stores import cache_directory

SUFFIXES = (".parquet", ".csv", ".tsv")
_BLOCK_BYTES = 8 << 20
_BLOCK_ROWS = 1 << 16
_UNIFIED_BLOCKS = 32
"""Blocks after which the texts that they share are held once."""
_CACHED_BYTES = 32 << 20
"""Text files from here on are parsed once."""
_NUMBERS = ("label", "time", "grade", "weight", "teacher")


@checked
class FieldsConfig:
    """Which column of a table is what; every row is read by itself."""

    member_id: str = "member_id"
    """Column of the member."""
    item_id: str = "item_id"
    """Column of the item."""
    label: str = "label"
    """Column of the label: true or false, 1 or 0, yes or no; any number with label_from."""
    time: str = "time"
    """Column of the time: a number, a date, or an ISO 8601 date and time; UTC where it names no zone."""
    label_from: float | None = None
    """Numbers from here on are a yes."""
    grade: str | None = None
    """Column of how relevant the item is, a number of at least 0, for NDCG; null: 1 for a yes, 0 for a no."""
    weight: str | None = None
    """Column of what a row counts in training on labels, above 0; null: 1."""
    teacher: str | None = None
    """Column of another scorer's log-odds of a yes, to distil from (teacher.column)."""
    request_id: str | None = None
    """Column of the request; null makes requests of consecutive rows of a member."""
    query: str | None = None
    """Column of what was asked in the request."""
    member: Mapping[str, str] = field(default_factory=dict)
    """Columns that describe the member, to the names that they are shown by, such as age_years to age."""
    context: Mapping[str, str] = field(default_factory=dict)
    """Columns that describe the moment, such as page or device, to the names that they are shown by."""
    item: Mapping[str, str] = field(default_factory=dict)
    """Columns that describe the item, to the names that they are shown by."""
    encoding: str = "utf-8"
    """Of a text file."""

    def __post_init__(self) -> None:
        if not self.item:
            raise ConfigError("fields.item is empty; name at least one column that tells items apart")
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ConfigError(f"fields.encoding: unknown {self.encoding!r}; known are utf-8, latin-1, cp1252") from None

    @property
    def columns(self) -> list[str]:
        """All columns that are read."""
        named = [self.member_id, self.item_id, self.label, self.time, *self.member, *self.context, *self.item]
        others = [self.grade, self.weight, self.teacher, self.request_id, self.query]
        return list(dict.fromkeys([*named, *(name for name in others if name)]))


def read_table(path: Path, fields: FieldsConfig) -> tuple[Log, dict[str, Features]]:
    """The rows of a file, or of all files of a directory, as a log, and its members; features stand in the rows.

    Raises: DataError, naming file, row and column, for a file that cannot be read, a missing column or a bad value.
    """
    kept = _cache_of(path, fields)
    if kept is not None and kept.is_file():
        table = pyarrow.parquet.read_table(kept)
    else:
        table = parse(_blocks(path, fields), fields)
        if kept is not None:
            keep(kept, partial(pyarrow.parquet.write_table, table))
            say(f"{path.name}: {len(table)} rows; their parsed form is kept in {kept.parent}")
    log = log_of(table, fields)
    del table
    pyarrow.default_memory_pool().release_unused()
    return log, dict.fromkeys(log.member.values.to_pylist(), NO_FEATURES)


def parse(blocks: Iterable[tuple[str, int, pyarrow.RecordBatch]], fields: FieldsConfig) -> pyarrow.Table:
    """Blocks of any columns as one table of what the fields say: numbers, and texts that are held once.

    Args:
      blocks: name of the file, number of the first row in it, and rows.
    """
    parts: list[pyarrow.Table] = []
    for where, first_row, block in blocks:
        parts.append(_parsed(where, first_row, block, fields))
        if len(parts) == _UNIFIED_BLOCKS:
            parts = [_joined(parts)]
    if not parts:
        raise DataError("the table has no rows.")
    return _joined(parts)


def log_of(table: pyarrow.Table, fields: FieldsConfig) -> Log:
    """What `parse` made, as a log; rows of one moment are in the order of their items, whatever that of the file."""

    def coded(name: str | None) -> Coded | None:
        return None if name is None else Coded.of(_only_chunk(table[f"text:{name}"]))

    def numbers(name: str) -> np.ndarray | None:
        return _only_chunk(table[name]).to_numpy(zero_copy_only=False) if name in table.column_names else None

    member, item = coded(fields.member_id), coded(fields.item_id)
    label, time = numbers("label"), numbers("time")
    assert member is not None and item is not None and label is not None and time is not None
    rank = np.empty(len(item.values), dtype=np.int64)
    rank[pyarrow.compute.sort_indices(item.values).to_numpy()] = np.arange(len(rank))
    return Log(
        member=member,
        item=item,
        label=label.astype(bool),
        time=time,
        tie=(2 * rank[item.codes] + label).astype(np.int32 if len(rank) < 2**30 else np.int64),
        request=coded(fields.request_id),
        query=coded(fields.query),
        grade=numbers("grade"),
        weight=numbers("weight"),
        teacher=numbers("teacher"),
        of_member={shown: Coded.of(_only_chunk(table[f"text:{name}"])) for name, shown in fields.member.items()},
        of_item={shown: Coded.of(_only_chunk(table[f"text:{name}"])) for name, shown in fields.item.items()},
        of_context={shown: Coded.of(_only_chunk(table[f"text:{name}"])) for name, shown in fields.context.items()},
    )


def _parsed(where: str, first_row: int, block: pyarrow.RecordBatch, fields: FieldsConfig) -> pyarrow.Table:
    def at(name: str) -> columns.Where:
        return columns.Where(where, first_row, name)

    found: dict[str, Any] = {}
    if fields.label_from is None:
        found["label"] = columns.labels(block[fields.label], at(fields.label))
    else:
        found["label"] = columns.numbers(block[fields.label], at(fields.label)) >= fields.label_from
    found["time"] = columns.times(block[fields.time], at(fields.time))
    for kind, least in (("grade", "at least 0"), ("weight", "above 0")):
        name = getattr(fields, kind)
        if name is not None:
            found[kind] = values = columns.numbers(block[name], at(name)).astype(np.float32)
            bad = np.flatnonzero((values < 0) | ((kind == "weight") & (values == 0)))
            if len(bad):
                at(name).refuse(int(bad[0]), f"is {values[bad[0]]:g}; expected a number of {least}")
    if fields.teacher is not None:
        found["teacher"] = columns.numbers(block[fields.teacher], at(fields.teacher)).astype(np.float32)
    ids = {fields.member_id, fields.item_id, *([fields.request_id] if fields.request_id else [])}
    described = [*fields.member, *fields.context, *fields.item, *([fields.query] if fields.query else [])]
    for name in dict.fromkeys([*ids, *described]):
        values = columns.texts(block[name], at(name))
        if name in ids and values.null_count:
            at(name).refuse(values.is_null().to_pylist().index(True), "is None; expected a value")
        found[f"text:{name}"] = values.dictionary_encode()
    return pyarrow.table(found)


def _joined(parts: list[pyarrow.Table]) -> pyarrow.Table:
    return pyarrow.concat_tables(parts).unify_dictionaries().combine_chunks()


def _only_chunk(column: pyarrow.ChunkedArray) -> pyarrow.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.unify_dictionaries().combine_chunks()


def _blocks(path: Path, fields: FieldsConfig) -> Iterator[tuple[str, int, pyarrow.RecordBatch]]:
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no file in it ends in {', '.join(SUFFIXES)}.")
    with bar("reading rows") as progress:
        for file in files:
            first_row = 1
            for block in _of_file(file, fields):
                yield str(file), first_row, block
                first_row += len(block)
                progress.advance(len(block))


def _of_file(path: Path, fields: FieldsConfig) -> Iterator[pyarrow.RecordBatch]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of table {path.suffix!r}; accepted are {', '.join(SUFFIXES)}.")
    try:
        if path.suffix == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            _check(path, file.schema_arrow.names, fields)
            yield from file.iter_batches(_BLOCK_ROWS, columns=fields.columns, use_threads=False)
        else:
            with _open(path, fields) as reader:
                _check(path, reader.schema.names, fields)
            with _open(path, fields, include_columns=fields.columns) as reader:
                yield from reader
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}).") from error


def _open(path: Path, fields: FieldsConfig, **options: Any) -> pyarrow.csv.CSVStreamingReader:
    return pyarrow.csv.open_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES, encoding=fields.encoding, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(fields.columns, pyarrow.binary()),
            null_values=[""],
            strings_can_be_null=True,
            **options,
        ),
    )


def _check(path: Path, names: list[str], fields: FieldsConfig) -> None:
    """Raises: DataError where a column is missing, or there more than once."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r} is there more than once; give each a name of its own.")
    for column in fields.columns:
        if column not in names:
            raise DataError(f"{path}: no column {column!r}; {nearest(column, names)}")


def _cache_of(path: Path, fields: FieldsConfig) -> Path | None:
    """Where the parsed form of a large text file is kept; None for a small one and for Parquet."""
    if path.suffix not in (".csv", ".tsv") or not path.is_file() or path.stat().st_size < _CACHED_BYTES:
        return None
    state = path.stat()
    known = [str(path.resolve()), state.st_size, state.st_mtime_ns, to_dict(fields)]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    return cache_directory("tables") / f"{path.stem}-{digest[:16]}.parquet"
