"""Choose the cut from a sweep: on the frontier of score and cost, the cheapest run that keeps enough of the score."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from limbeck.checkpoint import Checkpoint, hash_path, output_directory, write_json, write_manifest
from limbeck.config import build, checked, to_dict
from limbeck.distill.config import DistillConfig
from limbeck.errors import CheckpointError, ConfigError
from limbeck.flags import set_field
from limbeck.stage import How, Stage
from limbeck.sweep.frontier import on_frontier

CHOICE = "choice.json"
SUMMARY = "summary.json"


@checked
class ChooseConfig:
    """Which run of a sweep the pipeline goes on with."""

    source: str = "OUT/sweep"
    """The sweep's directory."""
    cost: Literal["flops", "tokens", "train_seconds", "peak_bytes"] = "flops"
    """What is to be saved. Seconds and bytes are measured, so that another machine may choose another run."""
    min_retention: float = 0.95
    """Least share of the uncut run's score that is kept, or of the best score where no run is uncut. Where no run keeps
    it, the best one is taken."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_retention < float("inf"):
            raise ConfigError(f"min_retention must be finite and at least 0; found {self.min_retention}")


def run(config: ChooseConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `choice.json`: the run's name, its axes, and what it keeps and costs.

    Raises: CheckpointError when the sweep's summary is missing or damaged.
    """
    file = Path(config.source) / SUMMARY
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        choice = choose(summary["runs"], summary["axes"], config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: no summary of a sweep ({error!r}); run the sweep again.") from error
    with output_directory(out, overwrite=True) as working:
        write_json(working / CHOICE, choice)
        write_manifest(working, stage="choose", config=config, inputs={"sweep": hash_path(file)}, metrics=choice)
    return Checkpoint(out)


def choose(rows: Sequence[Mapping[str, Any]], axes: Sequence[str], config: ChooseConfig) -> dict[str, Any]:
    """The chosen run among the rows of a summary, controls and failed runs left out; pure.

    The frontier holds the runs that no other run beats in score at their cost.
    """
    rows = [row for row in rows if not row.get("control") and "failed" not in row]
    costs, scores = [float(row[config.cost]) for row in rows], [float(row["accuracy"]) for row in rows]
    kept = [_retention(row, score, max(scores)) for row, score in zip(rows, scores, strict=True)]
    frontier = list(itertools.compress(range(len(rows)), on_frontier(costs, scores)))
    enough = [index for index in frontier if kept[index] >= config.min_retention]
    index = min(enough, key=costs.__getitem__) if enough else max(frontier, key=lambda i: (scores[i], -costs[i]))
    return {
        "run": rows[index]["name"],
        "axes": {axis: rows[index][axis] for axis in axes},
        "accuracy": scores[index],
        "retention": kept[index],
        config.cost: costs[index],
        "frontier": [rows[number]["name"] for number in frontier],
        "keeps_enough": bool(enough),
    }


def _retention(row: Mapping[str, Any], score: float, best: float) -> float:
    """As measured against the uncut run, or else against the best one."""
    if row.get("retention") is not None:
        return float(row["retention"])
    return score / best if best else 1.0


def read_choice(directory: Path) -> dict[str, Any]:
    """What `run` wrote."""
    return json.loads((directory / CHOICE).read_text(encoding="utf-8"))


def with_axes(config: DistillConfig, axes: Mapping[str, Any]) -> DistillConfig:
    """The run with the chosen values."""
    tree = to_dict(config)
    for axis, value in axes.items():
        set_field(DistillConfig, tree, axis, value, flag=f"axis {axis}")
    return build(DistillConfig, tree, "the chosen run")


STAGE = Stage(name="choose", config=ChooseConfig, run=run)
