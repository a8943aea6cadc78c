"""`limbeck pipeline RECIPE`: plan, run what has changed, tell what it took.

OUT/traces/  verify/  cache/  sweep/  choose/  distill/  recover/  quantize/  export/  smoke/    one a stage
OUT/evaluate/teacher/  evaluate/start/   MODEL/evaluation/                                      scores
OUT/state/       records of finished stages, by which they are skipped
OUT/report.html, report.md, limbeck.json, export/README.md                                      what it all was
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from limbeck.pipeline import finished
from limbeck.pipeline.advance import Pipeline
from limbeck.pipeline.config import PipelineConfig
from limbeck.pipeline.stages import stages_of
from limbeck.pipeline.telling import telling_stages
from limbeck.report.page import PAGE


def run(config: PipelineConfig, out: Path, *, dry_run: bool = False) -> dict[str, Any]:
    """Bring everything that the recipe asks for up to date in `out`.

    Args:
      dry_run: say what would run and what it would take; nothing is written.
    Returns: the stages that ran, or with `dry_run` the plan.
    Raises: what a stage raises; called again, the pipeline goes on there.
    """
    stages = stages_of(config)
    pipeline = Pipeline([*stages, *telling_stages(config, stages)], out)
    plan = pipeline.plan()
    if dry_run:
        return {"stages": [(p.stage.name, p.reason) for p in plan]}
    finished.forget(out)
    ran = pipeline.advance({})
    result = {"out": str(out), "report": str(out / PAGE)}
    finished.remember(sys.argv[2:], out, pipeline.files(), result | {"ran": []}, len(pipeline.stages))
    return result | {"ran": ran}
