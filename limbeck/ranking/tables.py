"""An interaction log in a Parquet or CSV file of any columns: a mapping says what they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from limbeck.config import checked
from limbeck.errors import ConfigError, DataError, nearest
from limbeck.ranking.request import Features, Interaction, LogRow

SUFFIXES = (".parquet", ".csv", ".tsv")
_YES, _NO = {"true", "yes", "1", "1.0"}, {"false", "no", "0", "0.0"}


@checked
class FieldsConfig:
    """Which column of a table is what."""

    member_id: str = "member_id"
    """Column of the member."""
    item_id: str = "item_id"
    """Column of the item."""
    label: str = "label"
    """Column of the label: true or false, 1 or 0, yes or no; any number with label_from."""
    time: str = "time"
    """Column of the time: a number, a date, or an ISO 8601 date and time."""
    label_from: float | None = None
    """Numbers from here on are a yes."""
    request_id: str | None = None
    """Column of the request; null makes requests of consecutive rows of a member."""
    member: Mapping[str, str] = field(default_factory=dict)
    """Columns that describe the member, to the names that they are shown by, such as age_years to age."""
    item: Mapping[str, str] = field(default_factory=dict)
    """Columns that describe the item, to the names that they are shown by."""

    def __post_init__(self) -> None:
        if not self.item:
            raise ConfigError("fields.item is empty; name at least one column that tells items apart")

    @property
    def columns(self) -> list[str]:
        """All columns that are read."""
        named = [self.member_id, self.item_id, self.label, self.time, *self.member, *self.item]
        return list(dict.fromkeys([*named, *([self.request_id] if self.request_id else [])]))


def read_table(path: Path, fields: FieldsConfig) -> tuple[list[LogRow], dict[str, Features]]:
    """The rows of a table as a log, and the members' features: those of a member's first row.

    Raises: DataError, naming file, row and column, for a file that cannot be read, a missing column or a bad value.
    """
    table = _read(path, fields)
    for column in fields.columns:
        if column not in table.column_names:
            raise DataError(f"{path}: no column {column!r}; {nearest(column, table.column_names)}")
    rows: list[LogRow] = []
    members: dict[str, Features] = {}
    for number, record in enumerate(table.select(fields.columns).to_pylist(), start=1):
        where = f"{path}:row {number}"
        row = _log_row(record, fields, where)
        rows.append(row)
        members.setdefault(row.member_id, _features(record, fields.member))
    return rows, members


def _log_row(record: Mapping[str, Any], fields: FieldsConfig, where: str) -> LogRow:
    def parsed(column: str, parse: Callable[[Any], Any], what: str) -> Any:
        try:
            return parse(record[column])
        except (TypeError, ValueError):
            raise DataError(f"{where}: {column} is {record[column]!r}; expected {what}.") from None

    label_from = fields.label_from
    if label_from is None:
        label = parsed(fields.label, _label, "true or false, 1 or 0, yes or no; or set fields.label_from")
    else:
        label = parsed(fields.label, _number, "a number") >= label_from
    interaction = Interaction(
        item_id=parsed(fields.item_id, _text, "a value"),
        item=_features(record, fields.item),
        label=label,
        time=parsed(fields.time, _time, "a number, a date or an ISO 8601 time"),
    )
    request_id = parsed(fields.request_id, _text, "a value") if fields.request_id else None
    return LogRow(parsed(fields.member_id, _text, "a value"), interaction, request_id)


def _features(record: Mapping[str, Any], names: Mapping[str, str]) -> Features:
    return {shown: str(record[column]) for column, shown in names.items() if record[column] is not None}


def _read(path: Path, fields: FieldsConfig) -> pyarrow.Table:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of table {path.suffix!r}; accepted are {', '.join(SUFFIXES)}.")
    try:
        if path.suffix == ".parquet":
            return _checked(path, pyarrow.parquet.read_table(path))
        # Ids are text, whatever they look like: 007 is not 7, and twenty digits are no float. Quoted texts have lines.
        ids = [fields.member_id, fields.item_id, *([fields.request_id] if fields.request_id else [])]
        return _checked(
            path,
            pyarrow.csv.read_csv(
                path,
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(ids, pyarrow.string()), null_values=[""], strings_can_be_null=True
                ),
            ),
        )
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}).") from error


def _checked(path: Path, table: pyarrow.Table) -> pyarrow.Table:
    """The table, where each column has a name of its own and text is UTF-8. Raises: DataError."""
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r} is there more than once; give each a name of its own.")
    for name, column in zip(table.column_names, table.columns, strict=True):
        if path.suffix != ".parquet" and pyarrow.types.is_binary(column.type):
            row = next(number for number, value in enumerate(column.to_pylist(), start=1) if not _is_utf8(value))
            raise DataError(f"{path}:row {row}: {name} is not UTF-8; convert the file (iconv -f latin1 -t utf-8).")
    return table


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def _text(value: Any) -> str:
    if value is None:
        raise ValueError
    return str(value)


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
        return value.timestamp()
    if isinstance(value, date):
        return float(value.toordinal()) * 86400
    return _number(value)
