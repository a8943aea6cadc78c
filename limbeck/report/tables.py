"""Rows and groups as tables: for the console, for the page and for Markdown rounded, for CSV as they were written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from rich import box
from rich.console import Console
from rich.table import Table as ConsoleTable
from rich.text import Text

from limbeck.checkpoint import Checkpoint
from limbeck.report.collect import SUMMARY, flatten
from limbeck.report.files import read_object
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


class Measured(Protocol):
    """Quantities by name, as far as they were measured."""

    def get(self, key: str, /) -> float | None: ...


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


def show_sweep(checkpoint: Checkpoint) -> None:
    """Print the table of a finished sweep.

    Raises: CheckpointError when its summary is malformed.
    """
    summary = read_object(checkpoint.path / SUMMARY)
    Console().print(console_table(summary["runs"], summary["axes"]))


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
    entries, places = _entries(models, groups), 2 if is_brief else 3
    columns: dict[str, Sequence[str]] = {
        "run": [*(model.name for model in models), *map(namer(groups), groups)],
        "score": _intervals(entries, "accuracy", places),
        "retention": [_of_whole(group, "retention", places) for group in entries],
        "gain kept": [_of_whole(group, "gain_kept", places) for group in entries],
        "derivation right": _shares(entries, "derivation_right", places),
        "answer as derived": _shares(entries, "answer_as_derived", places),
    }
    if is_brief and any(group.get("gain_kept") is not None for group in groups):
        # A console has room for one of the two, and a base student that knows something makes retention flatter.
        del columns["retention"]
    if not is_brief:
        columns |= _pass_columns(entries)
    if len({group.get("learning_rate") for group in groups}) > 1:
        columns["learning rate"] = _beside(models, [_rate(group) for group in groups])
    if any(len(group.rows) > 1 for group in groups):
        columns["seeds"] = _beside(models, [str(len(group.rows)) for group in groups])
    for key, cost in COSTS.items():
        columns |= sized(entries, key, cost.kind, cost.column)
    if is_brief:
        columns["stop rate"] = _shares(entries, "stop_rate", places)
        columns["output tokens"] = _shares(entries, "output_tokens", 0)
    else:
        columns["stop rate"] = _intervals(entries, "stop_rate", places)
        columns["output tokens"] = _intervals(entries, "output_tokens", 0)
        columns["sampler's mismatch, nats"] = _shares(entries, "rollout_mismatch_nats", 4)
        columns["on the frontier of"] = _beside(models, _frontiers(groups))
    return Table.of(columns)


def _entries(models: Sequence[Row], groups: Sequence[Group]) -> list[Group]:
    return [*(Group(rows=(model,)) for model in models), *groups]


def _beside(models: Sequence[Row], cells: Sequence[str]) -> list[str]:
    """The cells of the groups below those of the models, which have none."""
    return [MISSING] * len(models) + list(cells)


def _intervals(groups: Sequence[Group], key: str, places: int = 3) -> list[str]:
    return [interval(group.estimate(key), places) for group in groups]


def _shares(groups: Sequence[Group], key: str, places: int = 3) -> list[str]:
    return [share(group.get(key), places) for group in groups]


def sized(rows: Sequence[Measured], key: str, kind: Kind, title: str) -> dict[str, Sequence[str]]:
    """A column of numbers on one scale; `title` has its unit for {}."""
    values = [row.get(key) for row in rows]
    scale = scale_of(values, kind)
    return {title.format(scale.unit).strip(", "): list(map(scale.write, values))}


def _frontiers(groups: Sequence[Group]) -> list[str]:
    """The costs at which each group is on the frontier."""
    on = {cost.word: frontier(groups, key) for key, cost in COSTS.items()}
    return [_mark([word for word in on if on[word][index]]) for index in range(len(groups))]


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
            "traces that lost the end marker": _shares(groups, "lost_end_marker_fraction"),
            "traces that lost the first derivation": _shares(groups, "lost_first_derivation_fraction"),
        }
    )


def stop_table(groups: Sequence[Group], models: Sequence[Row]) -> Table:
    """How the students end their outputs."""
    entries = _entries(models, groups)
    return Table.of(
        {
            "run": [*(model.name for model in models), *map(namer(groups), groups)],
            "stopped by itself": _intervals(entries, "stop_rate"),
            "closed its thought": _intervals(entries, "end_marker_rate"),
            "output tokens": _intervals(entries, "output_tokens", 1),
            "answers that could not be judged": _shares(entries, "unknown_fraction"),
            "validation CE, nats a token": _shares(entries, "validation_ce", 4),
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


def _of_whole(group: Group, key: str, places: int) -> str:
    """Retention or gain kept; the uncut run is what the others are measured by, so its 1 has no interval."""
    value = group.get(key)
    if group.is_uncut and value == 1:
        return f"{value:.{places}f} (reference)"
    return interval(group.estimate(key), places)


def _rate(group: Group) -> str:
    rate = group.get("learning_rate")
    return MISSING if rate is None else f"{rate:g}"


def _mark(words: Sequence[str]) -> str:
    return "all" if len(words) == len(COSTS) else ", ".join(words) or MISSING


def _markdown_cell(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())


def _csv_cell(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)
