"""What the compression stages share: open the model, walk or solve, write a finished checkpoint, report."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from limbeck.checkpoint import Checkpoint, output_directory, write_json, write_manifest
from limbeck.compress.blocks import Blocks
from limbeck.compress.calibrate import CalibrationConfig, Rows, split_rows
from limbeck.compress.fidelity import GateConfig, check, compare, label_ids
from limbeck.compress.moments import StoredMoments
from limbeck.compress.walk import Method, Record, WalkOptions, solve_stored, walk, write_rest
from limbeck.compress.weights import ShardWriter, stored_size
from limbeck.config import config_hash
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger
from limbeck.models.load import load_model, load_tokenizer, locate, model_hash, quiet
from limbeck.progress import console
from limbeck.stage import How

Finish = Callable[[Path, list[Record]], dict[str, Any]]
ERRORS = "layers.json"
"""Error, seconds and calibration tokens of every solved layer."""


@dataclass(frozen=True, slots=True)
class Job:
    """One compression of one model."""

    stage: str
    """Name of the stage for manifest and progress bar."""
    model: str
    config: Any
    """The stage's config, for the manifest."""
    calibration: CalibrationConfig
    moments: Path | None
    """Stored moments to solve from; None walks."""
    options: WalkOptions
    gate: GateConfig
    """Held-out comparison with the model it was made of."""
    solver: str
    """Name of the method, for the estimate of a dry run."""
    needs_data: bool = True
    """False for methods that look at the weights only: nothing is calibrated."""


def compress(
    job: Job,
    blocks: Blocks,
    method: Method,
    out: Path,
    *,
    how: How,
    finish: Finish,
) -> Checkpoint:
    """Run a method over a model and write the checkpoint.

    Args:
      job: what is compressed and how.
      blocks: its model.
      method: the solver on the walk.
      out: final directory.
      how: as for every stage.
      finish: called as `finish(directory, records)` before the manifest is written; returns further metrics.
    """
    tokenizer = load_tokenizer(job.model)
    ledger, key = Ledger(), model_hash(job.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as working:
        writer = ShardWriter(working, len(blocks) + 1)
        with ledger.phase(job.stage):
            records, rows = _records(job, blocks, method, writer, tokenizer, key, device)
        with ledger.phase("saving"):
            stored_bytes = write_rest(blocks, writer)
            blocks.config.save_pretrained(working)
            tokenizer.save_pretrained(working)
            _save_generation_config(job.model, working)
            metrics = summary(records) | {
                "weight_bytes": stored_bytes,
                "calibration_tokens": rows.tokens if rows else 0,
            }
            metrics |= finish(working, records)
        with ledger.phase("comparison"):
            metrics |= _held_out(job, working, tokenizer)
        write_json(working / ERRORS, [record._asdict() for record in records])
        write_manifest(
            working, stage=job.stage, config=job.config, inputs={"model": key}, ledger=ledger.as_dict(), metrics=metrics
        )
    return Checkpoint(out)


def _records(
    job: Job, blocks: Blocks, method: Method, writer: ShardWriter, tokenizer: Any, key: str, device: torch.device
) -> tuple[list[Record], Rows | None]:
    if job.moments is not None:
        stored = StoredMoments(job.moments, job.model)
        return solve_stored(blocks, stored, method, job.options, writer, device), None
    rows = _rows(job, tokenizer)
    fingerprint = config_hash({"stage": job.stage, "config": config_hash(job.config), "model": key})
    records = walk(blocks, rows, method, job.options, writer, fingerprint, device)
    return records, rows if job.needs_data else None


def _rows(job: Job, tokenizer: Any) -> Rows:
    """Calibration tokens; a single one where nothing is calibrated, so that the walk has something to pass through."""
    if not job.needs_data:
        return Rows.of([[0]])
    return split_rows(job.calibration, tokenizer, job.model, job.gate.sequences)[0]


def _held_out(job: Job, directory: Path, tokenizer: Any) -> dict[str, Any]:
    """What the compressed model lost on text beside the calibration, and what it fails of its gate."""
    if not job.gate.sequences:
        return {}
    try:
        _, rows = split_rows(job.calibration, tokenizer, job.model, job.gate.sequences)
    except ConfigError:
        # A method that looks at the weights only may have no text at hand.
        if job.needs_data:
            raise
        rows = None
    if rows is None:
        return {}
    labels = label_ids(job.gate.labels, tokenizer)
    found = compare(load_model(job.model), load_model(str(directory)), rows, labels)
    failures = check(found, job.gate)
    if failures:
        console.print(f"{job.stage}: the model fails its gate: {'; '.join(failures)}", style="red", highlight=False)
    return {"held_out": found, "held_out_tokens": rows.tokens, "gate_failures": failures}


def inputs_of(config: Any) -> dict[str, str]:
    """What a compression reads: the model."""
    return {"model": model_hash(config.model)}


def summary(records: list[Record]) -> dict[str, Any]:
    """Mean and worst layer error, and the time of solving."""
    errors = [record.error for record in records]
    worst = max(records, key=lambda record: record.error, default=None)
    return {
        "layers": len(records),
        "mean_layer_error": statistics.fmean(errors) if errors else 0.0,
        "worst_layer": worst.name if worst else None,
        "worst_layer_error": worst.error if worst else 0.0,
        "solve_seconds": sum(record.seconds for record in records),
        "layers_without_inputs": sum(record.tokens == 0 for record in records),
    }


def parameters_of(directory: Path) -> int:
    """Parameters of a written checkpoint; the mask beside them does not count."""
    return stored_size(directory).parameters


def _save_generation_config(model: str, directory: Path) -> None:
    place = locate(model)
    with quiet(), contextlib.suppress(OSError):  # most small checkpoints have none
        transformers.GenerationConfig.from_pretrained(place.path, local_files_only=place.is_local).save_pretrained(
            directory
        )
