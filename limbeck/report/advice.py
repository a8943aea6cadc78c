"""The section on cut advice: what is recommended, every cut that was considered, and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from limbeck.report.advised import Advised
from limbeck.report.plots import Plot
from limbeck.report.tables import Table
from limbeck.report.units import MISSING
from limbeck.sweep.cut_picture import NAMES, draw

HOW_TO_READ = (
    "Gain kept: predicted (score after the cut - score before training) / (score after whole traces - score before "
    "training), with its interval. Kept: share of the divergence between teacher and student, of the first derivations "
    "and of the ends of the traces that the cut leaves."
)


def advice_findings(found: Sequence[Advised]) -> list[str]:
    """The recommendation of each, its reasons and warnings."""
    return [
        line
        for _, advice in found
        for line in (advice["sentence"], *advice["reasons"], *advice["warnings"], *advice["not_seen"])
    ]


def advice_table(found: Sequence[Advised]) -> Table:
    """One line a cut."""
    cuts = [(name, cut) for name, advice in found for cut in advice["cuts"]]
    columns: dict[str, list[str]] = {"cut at": [NAMES[cut["policy"]] for _, cut in cuts]}
    if len(found) > 1:
        columns["advice"] = [name for name, _ in cuts]
    columns["tokens"] = [f"{cut['kept']['tokens']:.2f}" for _, cut in cuts]
    columns["length"] = [str(cut["budget_tokens"] or MISSING) for _, cut in cuts]
    columns["FLOPs"] = [f"{cut['flops']:.2f}" for _, cut in cuts]
    for name in ("divergence", "derivations", "ends"):
        columns[f"{name} kept"] = [_share(cut["kept"][name]) for _, cut in cuts]
    columns["gain kept"] = [
        f"{cut['gain_kept']:.2f} ({cut['gain_kept_low']:.2f} to {cut['gain_kept_high']:.2f})" for _, cut in cuts
    ]
    return Table.of(columns)


def advice_plots(found: Sequence[Advised]) -> list[Plot]:
    """The picture of each."""
    caption = "What is left to learn, how sure both models are, and what cuts are predicted to keep."
    return [Plot(f"cut_advice_{name}", caption, partial(draw, advice)) for name, advice in found]


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"
