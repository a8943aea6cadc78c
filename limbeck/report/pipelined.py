"""What pipelines left behind: their stages, what those were expected to take and took, and the models along the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.checkpoint import MANIFEST, Checkpoint
from limbeck.errors import CheckpointError

STAGE = "pipeline"


class StageRow(NamedTuple):
    """A stage of a pipeline."""

    name: str
    ran: bool
    """Whether it ran in the last call; else it was taken from an earlier one."""
    measured: Mapping[str, Any]
    """seconds, peak_bytes, tokens and flops, as far as they were counted."""
    predicted: Mapping[str, Any]
    """The same, before it ran."""


class Along(NamedTuple):
    """A model of a pipeline."""

    name: str
    numbers: Mapping[str, Any]


def read_steps(paths: Sequence[Path]) -> list[StageRow]:
    """The stages of all pipelines, in order; with several pipelines their names carry the directory's.

    Raises: CheckpointError for a manifest without them.
    """
    return [
        StageRow(_name(path, paths, row), bool(row["ran"]), row["measured"], row["predicted"] or {})
        for path in paths
        for row in _rows(path, "stages", ("stage", "ran", "measured", "predicted"))
    ]


def read_models(paths: Sequence[Path]) -> list[Along]:
    """The models that the pipelines scored, in the order in which they were made.

    Raises: CheckpointError as `read_steps`.
    """
    return [
        Along(_name(path, paths, row), row["numbers"]) for path in paths for row in _rows(path, "models", ("numbers",))
    ]


def shown_by(path: Path) -> list[Path]:
    """Directories of a pipeline that are told of as if they had been named: its sweep and its models."""
    return [path / place for place in Checkpoint(path).manifest["metrics"].get("shows", ())]


def _rows(path: Path, key: str, needed: Sequence[str]) -> list[Mapping[str, Any]]:
    rows = Checkpoint(path).manifest["metrics"].get(key)
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and row.keys() >= set(needed) for row in rows):
        raise CheckpointError(f"{path / MANIFEST}: no `{key}` of a pipeline in it; run the pipeline again.")
    return rows


def _name(path: Path, paths: Sequence[Path], row: Mapping[str, Any]) -> str:
    own = str(row.get("stage") or row.get("name"))
    return f"{path.resolve().name}: {own}" if len(paths) > 1 else own
