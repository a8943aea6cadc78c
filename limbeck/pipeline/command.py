"""`limbeck pipeline RECIPE`: plan, run what has changed, tell what it took.

OUT/traces/  verify/  cache/  sweep/  choose/  distill/  recover/  quantize/  export/  smoke/    one a stage
OUT/evaluate/teacher/  evaluate/start/   MODEL/evaluation/                                      scores
OUT/state/       records of finished stages, by which they are skipped
OUT/report.html, report.md, limbeck.json, export/README.md                                      what it all was
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from limbeck.checkpoint import Checkpoint
from limbeck.cost.hardware import measure
from limbeck.errors import LimbeckError
from limbeck.pipeline.advance import Pipeline, Predict
from limbeck.pipeline.config import PipelineConfig
from limbeck.pipeline.predict import Predictor, facts
from limbeck.pipeline.stages import stages_of
from limbeck.pipeline.task import Task
from limbeck.pipeline.telling import PAGE, telling_stages
from limbeck.progress import say
from limbeck.scale.console import amount, duration
from limbeck.stage import How


def run(config: PipelineConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Bring everything that the recipe asks for up to date in `out`.

    Raises: what a stage raises; called again, the pipeline goes on there.
    """
    pipeline = _pipeline(config, out)
    predict: Predict = _no_prediction
    if any(planned.reason for planned in pipeline.plan()):
        predict = partial(_predicted, Predictor(config, out, measure()))
    ran = pipeline.advance(predict)
    say(f"ran: {', '.join(ran) or 'nothing'}")
    say(f"report: {out / PAGE}")
    return Checkpoint(out)


def _pipeline(config: PipelineConfig, out: Path) -> Pipeline:
    stages = stages_of(config)
    return Pipeline([*stages, *telling_stages(config, stages)], out)


def _no_prediction(stage: Task) -> None:
    return None


def _predicted(predictor: Predictor, stage: Task) -> dict[str, Any] | None:
    """A prediction must not end a run: where none can be made, the stage itself says what is wrong."""
    try:
        found = predictor.of(stage)
    except (LimbeckError, OSError) as error:
        say(f"{stage.name}: no prediction ({error})")
        return None
    return None if found is None else facts(found)


def tell(config: PipelineConfig, out: Path, *, as_json: bool) -> None:
    """Print what would run, why, and what it would take; nothing is written."""
    hardware = measure()
    predict = partial(_predicted, Predictor(config, out, hardware))
    rows = [
        {"stage": planned.stage.name, "reason": planned.reason, "is_certain": planned.is_certain}
        | {"predicted": predict(planned.stage) if planned.reason else None}
        for planned in _pipeline(config, out).plan()
    ]
    if as_json:
        print(json.dumps({"stages": rows, "hardware": hardware._asdict() | {"flops": dict(hardware.flops)}}))
        return
    show_plan(rows)


def show_plan(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a stage: whether and why it runs, and what it is expected to take."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("stage", overflow="fold")
    table.add_column("runs", overflow="fold")
    for name in ("tokens", "FLOPs", "memory", "time"):
        table.add_column(name, justify="right", overflow="fold")
    known = [row["predicted"] for row in rows if row["predicted"]]
    for row in rows:
        table.add_row(row["stage"], row["reason"] or "no: unchanged", *_costs(row["predicted"] or {}))
    if known:
        table.add_row("all", "", *_costs(_all_of(known)))
    out = Console()
    out.print(table)
    for note in dict.fromkeys(itertools.chain.from_iterable(found["notes"] for found in known)):
        out.print(f"assumed: {note}", highlight=False)


def _all_of(known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the stages take together: sums, and the highest memory."""
    sums = {name: sum(found[name] for found in known) for name in ("flops", "seconds")}
    return sums | {"peak_bytes": max(found["peak_bytes"] for found in known)}


def _costs(found: Mapping[str, Any]) -> list[str]:
    """Tokens, FLOPs, memory and time; empty where nothing is expected."""
    tokens = found.get("tokens", 0) + found.get("new_tokens", 0)
    return [
        amount(tokens) if tokens else "",
        amount(found["flops"], "F") if found.get("flops") else "",
        amount(found["peak_bytes"], "B") if found.get("peak_bytes") else "",
        duration(found["seconds"]) if found.get("seconds") else "",
    ]
