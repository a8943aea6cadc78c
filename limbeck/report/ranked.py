"""What the tables of ranking pipelines say of their models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.checkpoint import MANIFEST, Checkpoint
from limbeck.errors import CheckpointError

STAGES = ("ranking table", "rank pipeline")
"""What writes such a table, and what older versions called it."""


class RankedModel(NamedTuple):
    """A model of a pipeline."""

    name: str
    row: Mapping[str, Any]


def read_ranking(paths: Sequence[Path]) -> list[RankedModel]:
    """The models of all pipelines, in order; with several pipelines their names carry the directory's.

    Raises: CheckpointError for a manifest without the table.
    """
    steps = []
    for path in paths:
        rows = Checkpoint(path).manifest["metrics"].get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "auc" in row for row in rows):
            raise CheckpointError(f"{path / MANIFEST}: no table of models in it; run the pipeline again.")
        label = f"{path.resolve().name}: " if len(paths) > 1 else ""
        steps += [RankedModel(f"{label}{row['model']}", row) for row in rows]
    return steps
