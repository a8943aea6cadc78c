"""What ranking pipelines and evaluations left behind: the models of their tables, and the baselines beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.checkpoint import MANIFEST, Checkpoint
from limbeck.errors import CheckpointError

EVALUATION = "rank evaluate"
STAGES = ("ranking table", "rank pipeline", EVALUATION)
"""What writes such rows: the table of a pipeline, what older versions called it, and an evaluation."""
BASELINE = "baseline: "
"""Begins the name of what reads no text."""


class RankedModel(NamedTuple):
    """A model of a pipeline."""

    name: str
    row: Mapping[str, Any]


def read_ranking(paths: Sequence[Path]) -> list[RankedModel]:
    """The models of all pipelines and evaluations, in order; with several pipelines their names carry the directory's.

    Behind them stand the baselines of the last that has any.

    Raises: CheckpointError for a manifest without the table.
    """
    steps = []
    for path in paths:
        manifest = Checkpoint(path).manifest
        is_one = manifest["stage"] == EVALUATION
        rows = [manifest["metrics"]] if is_one else manifest["metrics"].get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "auc" in row for row in rows):
            raise CheckpointError(f"{path / MANIFEST}: no table of models in it; run the stage again.")
        label = f"{path.resolve().name}: " if len(paths) > 1 and not is_one else ""
        steps += [RankedModel(f"{label}{row['model']}", row) for row in rows]
    known: Mapping[str, Any] = next((row["baselines"] for _, row in reversed(steps) if row.get("baselines")), {})
    return [*steps, *(RankedModel(f"{BASELINE}{name}", row) for name, row in known.items())]
