"""Rows and groups as tables: for the console, for the page and for Markdown rounded, for CSV as they were written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table as ConsoleTable
from rich.text import Text

from limbeck.report.collect import flatten
from limbeck.report.groups import Group, frontier, group_rows, namer, uncut_of
from limbeck.report.rows import FLOP_PARTS, Row, rows_of
from limbeck.report.units import MISSING, Kind, interval, scale_of, share


class Cost(NamedTuple):
    """What a run spends."""

    word: str
    kind: Kind
    column: str
    """Title of its column, around the unit."""


COSTS = {
    "tokens": Cost("tokens", "tokens", "{}"),
    "flops": Cost("FLOPs", "flops", "{}"),
    "train_seconds": Cost("seconds", "seconds", "train, {}"),
    "peak_bytes": Cost("memory", "bytes", "peak, {}"),
}


class Table(NamedTuple):
    """Text in rows; the first column names, the others are numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[str]]) -> Table:
        """A table from columns, without those in which nothing was measured."""
        kept = {title: cells for title, cells in columns.items() if any(cell != MISSING for cell in cells)}
        return cls(tuple(kept), tuple(zip(*kept.values(), strict=True)))


def console_table(runs: Sequence[Mapping[str, Any]], axes: Sequence[str] = ()) -> ConsoleTable:
    """The table that a sweep prints.

    Args:
      runs: the `runs` of a summary.
      axes: its `axes`; lead_fraction, keep_ending and seed are always told apart.
    Returns: a rich table, one line a setting.
    Raises: CheckpointError when a run is malformed.
    """
    return for_console(score_table(group_rows(rows_of(runs, axes, "summary")), (), is_brief=True))


def for_console(content: Table) -> ConsoleTable:
    """A table as rich prints it."""
    table = ConsoleTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for number, title in enumerate(content.header):
        # One word a line keeps the titles narrow, so that 80 columns hold the intervals.
        table.add_column(Text("\n".join(title.split(" "))), justify="left" if number == 0 else "right")
    for cells in content.rows:
        table.add_row(*map(Text, cells))
    return table


def score_table(groups: Sequence[Group], models: Sequence[Row], is_brief: bool = False) -> Table:
    """Quality beside cost: the teacher and the base student first, then one line a group.

    Args:
      groups: the runs, replicates put together.
      models: the teacher and the base student, as far as they were scored.
      is_brief: fit a console: two decimals, intervals of score and retention only, no frontier.
    """
    entries: list[Group] = [*(Group(rows=(model,)) for model in models), *groups]
    name, places = namer(groups), 2 if is_brief else 3
    on = {cost.word: frontier(groups, key) for key, cost in COSTS.items()}
    marks = [_mark([word for word in on if on[word][index]]) for index in range(len(groups))]
    columns: dict[str, Sequence[str]] = {
        "run": [*(model.name for model in models), *map(name, groups)],
        "score": [interval(group.estimate("accuracy"), places) for group in entries],
        "retention": [_retention(group, places) for group in entries],
    }
    if not is_brief:
        columns |= _pass_columns(entries)
    if any(len(group.rows) > 1 for group in groups):
        columns["seeds"] = [*(MISSING for _ in models), *(str(len(group.rows)) for group in groups)]
    for key, cost in COSTS.items():
        values = [group.get(key) for group in entries]
        scale = scale_of(values, cost.kind)
        columns[cost.column.format(scale.unit)] = [scale.write(value) for value in values]
    if is_brief:
        columns["stop rate"] = [share(group.get("stop_rate"), places) for group in entries]
        columns["output tokens"] = [share(group.get("output_tokens"), 0) for group in entries]
    else:
        columns["stop rate"] = [interval(group.estimate("stop_rate"), places) for group in entries]
        columns["output tokens"] = [interval(group.estimate("output_tokens"), 0) for group in entries]
        columns["on the frontier of"] = [*(MISSING for _ in models), *marks]
    return Table.of(columns)


def part_table(groups: Sequence[Group]) -> Table:
    """FLOPs by who spends them."""
    columns: dict[str, Sequence[str]] = {"run": list(map(namer(groups), groups))}
    totals = [group.get("flops") for group in groups]
    scale = scale_of(totals, "flops")
    columns[f"all, {scale.unit}"] = [scale.write(total) for total in totals]
    for part in FLOP_PARTS:
        values = [group.get(f"flops_{part}") for group in groups]
        columns[f"{part}, {scale.unit}"] = [scale.write(value) for value in values]
    return Table.of(columns)


def cut_table(groups: Sequence[Group]) -> Table:
    """What the cut took away, as shares of the traces and of the tokens."""
    return Table.of(
        {
            "run": list(map(namer(groups), groups)),
            "tokens over whole traces": [share(ratio(group, uncut_of(group, groups), "tokens")) for group in groups],
            "traces that lost the end marker": [share(group.get("lost_end_marker_fraction")) for group in groups],
            "traces that lost the first derivation": [
                share(group.get("lost_first_derivation_fraction")) for group in groups
            ],
        }
    )


def stop_table(groups: Sequence[Group], models: Sequence[Row]) -> Table:
    """How the students end their outputs."""
    entries: list[Group] = [*(Group(rows=(model,)) for model in models), *groups]
    return Table.of(
        {
            "run": [*(model.name for model in models), *map(namer(groups), groups)],
            "stopped by itself": [interval(group.estimate("stop_rate")) for group in entries],
            "closed its thought": [interval(group.estimate("end_marker_rate")) for group in entries],
            "output tokens": [interval(group.estimate("output_tokens"), 1) for group in entries],
            "answers that could not be judged": [share(group.get("unknown_fraction")) for group in entries],
            "validation CE, nats a token": [share(group.get("validation_ce"), 4) for group in entries],
        }
    )


def markdown(table: Table) -> str:
    """The table in Markdown."""
    lines = [table.header, tuple("---" if number == 0 else "---:" for number in range(len(table.header))), *table.rows]
    return "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in line) + " |" for line in lines)


def csv_text(rows: Sequence[Row]) -> str:
    """One line a run with everything that it reported, unrounded; nested values under dotted names."""
    records = [{"name": row.name, "source": row.source, **dict(flatten({**row.raw, "name": row.name}))} for row in rows]
    if not any(row.source for row in rows):
        for record in records:
            del record["source"]
    names = list(dict.fromkeys(name for record in records for name in record))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_csv_cell(record.get(name)) for name in names] for record in records)
    return stream.getvalue()


def ratio(group: Group, reference: Group | None, name: str) -> float | None:
    """A cost over that of the reference; None where one is missing or the reference spent nothing."""
    value, base = group.get(name), reference.get(name) if reference is not None else None
    return None if value is None or not base else value / base


def _pass_columns(groups: Sequence[Group]) -> dict[str, Sequence[str]]:
    """pass@k for every k that was measured; pass@1 is the score itself."""
    return {
        f"pass@{k:.0f}": [
            interval(group.estimate("pass_at_k")) if group.get("pass_k") == k else MISSING for group in groups
        ]
        for k in sorted({group.get("pass_k") or 0 for group in groups})
        if k > 1
    }


def _retention(group: Group, places: int) -> str:
    """The uncut run is what the others are measured by, so its 1 has no interval."""
    value = group.get("retention")
    if group.is_uncut and value == 1:
        return f"{value:.{places}f} (reference)"
    return interval(group.estimate("retention"), places)


def _mark(words: Sequence[str]) -> str:
    return "all" if len(words) == len(COSTS) else ", ".join(words) or MISSING


def _markdown_cell(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())


def _csv_cell(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)
