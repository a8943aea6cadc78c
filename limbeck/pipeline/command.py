"""`limbeck pipeline RECIPE`: plan, run what has changed, tell what it took.

OUT/traces/  verify/  cache/  sweep/  choose/  distill/  recover/  quantize/  export/  smoke/    one a stage
OUT/evaluate/teacher/  evaluate/start/   MODEL/evaluation/                                      scores
OUT/state/       records of finished stages, by which they are skipped
OUT/report.html, report.md, limbeck.json, export/README.md                                      what it all was
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from limbeck.errors import LimbeckError
from limbeck.pipeline import finished
from limbeck.pipeline.advance import Pipeline, Planned, Predict
from limbeck.pipeline.config import PipelineConfig
from limbeck.pipeline.predict import Predictor, facts
from limbeck.pipeline.stage import Stage
from limbeck.pipeline.stages import stages_of
from limbeck.pipeline.telling import telling_stages
from limbeck.progress import console
from limbeck.report.page import PAGE
from limbeck.scale.console import amount, duration
from limbeck.scale.hardware import measure


def run(config: PipelineConfig, out: Path, *, dry_run: bool = False, quiet: bool = False) -> dict[str, Any] | None:
    """Bring everything that the recipe asks for up to date in `out`.

    Args:
      dry_run: say what would run and what it would take; nothing is written.
      quiet: with `dry_run`, return the plan and print nothing.
    Returns: the stages that ran; with `dry_run` the plan, or None where it was printed.
    Raises: what a stage raises; called again, the pipeline goes on there.
    """
    stages = stages_of(config)
    pipeline = Pipeline([*stages, *telling_stages(config, stages)], out)
    plan = pipeline.plan()
    if dry_run:
        return _dry_run(config, plan, out, quiet)
    predict: Predict = _no_prediction
    if any(planned.reason for planned in plan):
        finished.forget(out)
        predict = partial(_predicted, Predictor(config, out, measure()))
    ran = pipeline.advance(predict)
    result = {"out": str(out), "report": str(out / PAGE)}
    finished.remember(sys.argv[2:], out, pipeline.files(), result | {"ran": []}, len(pipeline.stages))
    return result | {"ran": ran}


def _no_prediction(stage: Stage) -> None:
    return None


def _predicted(predictor: Predictor, stage: Stage) -> dict[str, Any] | None:
    """A prediction must not end a run: where none can be made, the stage itself says what is wrong."""
    try:
        found = predictor.of(stage)
    except (LimbeckError, OSError) as error:
        console.print(f"{stage.name}: no prediction ({error})", markup=False, highlight=False, soft_wrap=True)
        return None
    return None if found is None else facts(found)


def _dry_run(config: PipelineConfig, plan: Sequence[Planned], out: Path, quiet: bool) -> dict[str, Any] | None:
    hardware = measure()
    predict = partial(_predicted, Predictor(config, out, hardware))
    rows = [
        {"stage": planned.stage.name, "reason": planned.reason, "is_certain": planned.is_certain}
        | {"predicted": predict(planned.stage) if planned.reason else None}
        for planned in plan
    ]
    if quiet:
        return {"stages": rows, "hardware": hardware._asdict() | {"flops": dict(hardware.flops)}}
    show_plan(rows)
    return None


def show_plan(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a stage: whether and why it runs, and what it is expected to take."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("stage", "runs", "tokens", "FLOPs", "memory", "time"):
        table.add_column(name, justify="left" if name in ("stage", "runs") else "right", overflow="fold")
    for row in rows:
        found = row["predicted"] or {}
        tokens = found.get("tokens", 0) + found.get("new_tokens", 0)
        cells = [
            amount(tokens) if tokens else "",
            amount(found["flops"], "F") if found.get("flops") else "",
            amount(found["peak_bytes"], "B") if found.get("peak_bytes") else "",
            duration(found["seconds"]) if found.get("seconds") else "",
        ]
        table.add_row(row["stage"], row["reason"] or "no: unchanged", *cells)
    known = [row["predicted"] for row in rows if row["predicted"]]
    if known:
        flops = amount(sum(found["flops"] for found in known), "F")
        highest = amount(max(found["peak_bytes"] for found in known), "B")
        table.add_row("all", "", "", flops, highest, duration(sum(found["seconds"] for found in known)))
    out = Console()
    out.print(table)
    for note in dict.fromkeys(note for found in known for note in found["notes"]):
        out.print(f"assumed: {note}", highlight=False)
