"""A table and a picture of `limbeck bench serve`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

COLUMNS = {
    "replicas": "replicas",
    "workload": "workload",
    "prefixes": "prefixes",
    "requests_per_second": "requests/s",
    "requests": "sent",
    "failed": "failed",
    "ttft_p50_seconds": "TTFT p50",
    "ttft_p95_seconds": "p95",
    "ttft_p99_seconds": "p99 (s)",
    "tpot_p50_seconds": "TPOT p50",
    "tpot_p95_seconds": "p95",
    "tpot_p99_seconds": "p99 (s)",
    "items_per_second": "items/s",
    "items_per_second_in_slo": "items/s in time",
    "tokens_per_second": "tokens/s",
    "within_slo": "in time",
}
COLOURS = {"cold": "#4a6fa5", "hot": "#b4541a"}


def write_page(tree: dict[str, Any], file: Path) -> None:
    """The table, with what was asked."""
    config, rows = tree["config"], tree["rows"]
    lines = [
        "# limbeck bench serve",
        "",
        f"{config['url'] or config['model']}, {config['precision']}; prefixes of {config['prefix_tokens']} tokens, "
        f"{config['items']} items of {config['item_tokens']} a scoring request, texts of {config['new_tokens']}; "
        f"arrivals for {config['seconds']:g} s a load; in time means within {config['slo_seconds']:g} s to the first "
        "token, or to a scoring answer. Hot: one of "
        f"{config['hot_prefixes']} prefixes that the cache knows; cold: a new one each time. Latencies count from "
        "when a request was due.",
        "",
        f"{tree['machine']['processor']}, {tree['machine']['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in tree["versions"].items()),
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(_cell(name, row[name]) for name in COLUMNS) + " |" for row in rows),
        "",
        "![Latency and throughput over load](serve.png)",
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_plot(tree: dict[str, Any], file: Path) -> None:
    """Latency and what is done in time, over the load; of several numbers of replicas the first and the last, paler."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    limit = tree["config"]["slo_seconds"]
    _lines(axes[0], tree["rows"], "score", "ttft", "scoring: seconds to the answer")
    _lines(axes[1], tree["rows"], "text", "ttft", "texts: seconds to the first token")
    for place in axes[:2]:
        place.axhline(limit, color="#999999", linewidth=0.8, linestyle=":")
        place.set_yscale("log")
        for axis_ticks in (place.yaxis.set_major_formatter, place.yaxis.set_minor_formatter):
            axis_ticks(FuncFormatter(lambda value, _: f"{value:g}"))
    for own, colour, name, opacity in _series(tree["rows"], "score"):
        loads = [row["requests_per_second"] for row in own]
        values = [row["items_per_second_in_slo"] for row in own]
        axes[2].plot(loads, values, "o-", color=colour, label=name, alpha=opacity)
    axes[2].set_title(f"items scored a second, within {limit:g} s", fontsize=10)
    axes[2].set_ylim(bottom=0)
    for place in axes:
        place.set_xlabel("requests a second")
        place.spines[["top", "right"]].set_visible(False)
        if place.get_legend_handles_labels()[0]:
            place.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def _lines(place: Axes, rows: Sequence[dict[str, Any]], workload: str, name: str, title: str) -> None:
    for own, colour, told, opacity in _series(rows, workload):
        loads = [row["requests_per_second"] for row in own]
        for percent, style in ((50, "o-"), (99, "^--")):
            values = [row[f"{name}_p{percent}_seconds"] for row in own]
            place.plot(loads, values, style, color=colour, label=f"{told} p{percent}", alpha=opacity)
    place.set_title(title, fontsize=10)


def _series(rows: Sequence[dict[str, Any]], workload: str) -> list[tuple[list[dict[str, Any]], str, str, float]]:
    """Rows, colour, name and opacity of each line of a picture."""
    counts = list(dict.fromkeys(row["replicas"] for row in rows))
    found = []
    for count in dict.fromkeys((counts[0], counts[-1])):
        for prefixes, colour in COLOURS.items():
            keys = (workload, prefixes, count)
            own = [row for row in rows if (row["workload"], row["prefixes"], row["replicas"]) == keys]
            name = prefixes if len(counts) == 1 else f"{prefixes} x{count}"
            found += [(own, colour, name, 1.0 if count == counts[0] else 0.45)] if own else []
    return found


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name == "within_slo":
        return f"{value:.0%}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
