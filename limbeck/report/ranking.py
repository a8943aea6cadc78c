"""The section on ranking pipelines: what every step keeps of the AUC, and what it weighs and takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from limbeck.ranking.beside import headline
from limbeck.report.drawing import LIGHT, legend, panels, style
from limbeck.report.plots import Plot
from limbeck.report.ranked import RankedModel
from limbeck.report.tables import Table
from limbeck.report.units import MISSING

HOW_TO_READ = (
    "All figures are those of the test part; in brackets 95 % intervals over whole requests. Difference, Kendall's tau "
    "and the churn of the best k are against the model in “before”; p is DeLong's, which takes rows for independent. "
    "Baselines read no text, or count its words; the best is chosen on this part. Latency: one request to the "
    "scoring engine, prefix not known before, median and 95th percentile."
)


def ranking_table(steps: Sequence[RankedModel]) -> Table:
    """One line a model: quality, what moved against the model before it, size and latency."""
    columns: dict[str, list[str]] = {"model": [step.name for step in steps]}
    columns["before"] = [step.row.get("before") or MISSING for step in steps]
    columns["AUC"] = _intervals(steps, "auc")
    columns["difference"] = _intervals(steps, "auc_difference", "+.4f")
    columns["p"] = _numbers(steps, "delong_p_value", ".2g")
    columns["of unpruned AUC"] = _numbers(steps, "relative_auc_from_unpruned", "+.2%")
    columns["request AUC"] = _numbers(steps, "request_auc", ".4f")
    columns["NDCG@5"] = _numbers(steps, "ndcg_at_5", ".4f")
    columns["log-loss"] = _numbers(steps, "log_loss", ".4f")
    columns["ECE"] = _numbers(steps, "calibration_error", ".3f")
    columns["tau"] = _numbers(steps, "kendall_tau", ".3f")
    columns["churn of top 5"] = _numbers(steps, "top_5_churn", ".3f")
    columns["parameters"] = _numbers(steps, "parameters", ",")
    columns["KiB"] = [f"{_kibibytes(step.row):,.0f}" if "weight_bytes" in step.row else MISSING for step in steps]
    columns["ms, median"] = _numbers(steps, "latency_p50_ms", ".2f")
    columns["ms, p95"] = _numbers(steps, "latency_p95_ms", ".2f")
    return Table.of(columns)


def ranking_findings(steps: Sequence[RankedModel]) -> list[str]:
    """Whether each model beats the best baseline, then the AUC that every compressed one lost."""
    found = [headline(row) for _, row in steps if "baselines" in row]
    for _, row in steps:
        if "relative_auc_from_unpruned" in row:
            low, high = (row[f"auc_difference_{end}_from_unpruned"] for end in ("low", "high"))
            found.append(
                f"{row['model']}: AUC {row['auc']:.4f}, {row['relative_auc_from_unpruned']:+.2%} of the unpruned "
                f"student's (difference {row['auc_difference_from_unpruned']:+.4f}, {low:+.4f} to {high:+.4f})."
            )
    return found


def ranking_plots(steps: Sequence[RankedModel]) -> list[Plot]:
    """AUC against size and against latency where a pipeline measured them, and reliability diagrams."""
    timed = [step for step in steps if "latency_p50_ms" in step.row]
    told = [step for step in steps if step.row.get("reliability")]
    plots = []
    if timed:
        caption = "AUC of every model against its size and its latency; bars are 95 % intervals over requests."
        plots.append(Plot("ranking", caption, partial(_against_costs, timed)))
    if told:
        caption = (
            "Reliability: the share of yes among pairs of about one score; on the diagonal a score is a probability."
        )
        plots.append(Plot("reliability", caption, partial(_reliability, told)))
    return plots


def _against_costs(steps: Sequence[RankedModel]) -> Figure:
    figure, drawn = panels(["file of the weights, KiB", "a request, ms (median)"], share_x=False)
    for axes, cost in zip(drawn, (_kibibytes, _milliseconds), strict=True):
        for number, (name, row) in enumerate(steps):
            place, colour = cost(row), style(number)["color"]
            axes.plot([place], [row["auc"]], **style(number) | {"linestyle": "none"}, label=name)
            axes.vlines(place, row["auc_low"], row["auc_high"], color=colour, linewidth=1, alpha=0.6)
        axes.set_xlim(0, 1.1 * max(cost(row) for _, row in steps))
        axes.locator_params(axis="x", nbins=4)
    drawn[0].set_ylabel("AUC on the test part", color=LIGHT.ink)
    drawn[0].legend(fontsize=7, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.12))
    return figure


def _reliability(steps: Sequence[RankedModel]) -> Figure:
    figure, (axes,) = panels(["share of yes against mean score"])
    axes.plot([0, 1], [0, 1], color=LIGHT.ink, linewidth=0.8, linestyle=":")
    for number, (name, row) in enumerate(steps):
        bins = row["reliability"]
        places = [entry["mean_probability"] for entry in bins]
        axes.plot(places, [entry["share_of_yes"] for entry in bins], **style(number), label=name)
        ends = ([entry[f"share_of_yes_{end}"] for entry in bins] for end in ("low", "high"))
        axes.vlines(places, *ends, color=style(number)["color"], linewidth=1, alpha=0.6)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("mean score", color=LIGHT.ink)
    axes.set_ylabel("share of yes", color=LIGHT.ink)
    legend(axes, len(steps))
    return figure


def _kibibytes(row: Mapping[str, Any]) -> float:
    return float(row["weight_bytes"]) / 1024


def _milliseconds(row: Mapping[str, Any]) -> float:
    return float(row["latency_p50_ms"])


def _numbers(steps: Sequence[RankedModel], key: str, form: str) -> list[str]:
    values = [step.row.get(key) for step in steps]
    return [MISSING if value is None else format(value, form) for value in values]


def _intervals(steps: Sequence[RankedModel], key: str, form: str = ".4f") -> list[str]:
    cells = []
    for step in steps:
        values = [step.row.get(name) for name in (key, f"{key}_low", f"{key}_high")]
        known = [format(value, form) for value in values if value is not None]
        cells.append(f"{known[0]} ({known[1]} to {known[2]})" if len(known) == 3 else MISSING)
    return cells
