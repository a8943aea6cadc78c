"""What a study leaves behind: result.json, table.md, PNG plots, and one HTML page that holds all of it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from limbeck.checkpoint import write_json, write_manifest

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""Header and rows."""

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}code{background:#f3f3f3}"""


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG and let go of the figure."""
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def write_study(
    out: Path,
    *,
    stage: str,
    title: str,
    notes: Sequence[str],
    config: Any,
    result: Mapping[str, Any],
    tables: Mapping[str, Table],
    plots: Mapping[str, Path],
) -> None:
    """Write result.json, table.md, page.html and the manifest into `out`; plots are there already."""
    write_json(out / "result.json", result)
    markdown = "\n\n".join(f"## {name}\n\n{markdown_table(table)}" for name, table in tables.items())
    (out / "table.md").write_text(f"# {title}\n\n" + "\n\n".join(notes) + f"\n\n{markdown}\n", encoding="utf-8")
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes)]
    for name, path in plots.items():
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    parts += [f"<h2>{html.escape(name)}</h2>{_html_table(table)}" for name, table in tables.items()]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    page = f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"
    (out / "page.html").write_text(page, encoding="utf-8")
    write_manifest(out, stage=stage, config=config, inputs={}, metrics=result)


def markdown_table(table: Table) -> str:
    """The table in Markdown, first column to the left, the others to the right."""
    header, rows = table
    lines = [
        header,
        ["---", *["---:"] * (len(header) - 1)],
        *[[cell_text(cell) for cell in row] for row in rows],
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell_text(value: Any) -> str:
    """A value as a table shows it: four significant digits, a dash for what is not there."""
    if value is None:
        return "–"
    if isinstance(value, float) and math.isinf(value):
        return "never"
    if isinstance(value, float):
        return f"{value:.0f}" if value == int(value) and abs(value) < 1e7 else f"{value:.4g}"
    return str(value)


def _html_table(table: Table) -> str:
    header, rows = table
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell_text(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
