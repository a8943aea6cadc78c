"""What the compression stages share: their common settings, what is checked first, and a finished checkpoint."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from limbeck.checkpoint import Checkpoint, output_directory, write_json, write_manifest
from limbeck.compress import journal
from limbeck.compress.beside import copy_beside
from limbeck.compress.blocks import Blocks, Group, groups_of
from limbeck.compress.calibrate import CalibrationConfig, Rows, split_rows
from limbeck.compress.fidelity import GateConfig, check, compare, label_ids, limits_of
from limbeck.compress.method import Method, Record
from limbeck.compress.moments import StoredMoments
from limbeck.compress.problem import Moments
from limbeck.compress.tokenizer_fit import check_tokens
from limbeck.compress.walk import WalkOptions, foldable, solve_stored, walk, write_rest
from limbeck.compress.weights import ShardWriter
from limbeck.config import checked, config_hash
from limbeck.errors import CompressionError, ConfigError
from limbeck.ledger import Ledger
from limbeck.models.load import load_model, load_tokenizer, model_hash
from limbeck.models.placement import here
from limbeck.progress import console
from limbeck.stage import How

Finish = Callable[[Path, list[Record]], dict[str, Any]]
ERRORS = "layers.json"
"""Error, seconds and calibration tokens of every solved layer."""


@checked
class CompressConfig:
    """What every compression asks for."""

    model: str
    """Directory, alias (tiny-teacher, tiny-student, smollm2-135m) or hub id."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Tokens that the layers are shown."""
    moments: Path | None = None
    """Moments collected by `limbeck moments`: solve from them, without passing through the model again."""
    dense_targets: bool = False
    """Let every layer aim at the dense model's output, so that later layers repair earlier damage."""
    gate: GateConfig = field(default_factory=GateConfig)
    """What the compressed model may lose on held-out text."""
    ignore: tuple[str, ...] = ()
    """Layers whose name contains one of these are left as they are."""

    def __post_init__(self) -> None:
        if self.moments is not None and self.dense_targets:
            raise ConfigError("dense_targets needs the walk; stored moments are those of the dense model already.")


@dataclass(frozen=True, slots=True)
class Job:
    """One compression of one model."""

    stage: str
    """Name of the stage for manifest and progress bar."""
    config: CompressConfig
    blocks: Blocks
    """Of its model."""
    method: Method
    needs_data: bool
    """False for methods that look at the weights only: nothing is calibrated."""
    finish: Finish
    """Called as `finish(directory, records)` before the manifest is written; returns further metrics."""

    @property
    def options(self) -> WalkOptions:
        """Of the walk."""
        return WalkOptions(self.stage, self.config.dense_targets, self.config.ignore)

    @property
    def walks(self) -> bool:
        """Whether the model is passed through."""
        return self.needs_data and self.config.moments is None


@dataclass(frozen=True, slots=True)
class _Text:
    """What is read of the calibration text."""

    calibration: Rows | None
    held_out: Rows | None
    """For the comparison at the end; None skips it."""
    labels: list[int]


def compress(job: Job, out: Path, how: How) -> Checkpoint:
    """Run a method over a model and write the checkpoint.

    Args:
      job: what is compressed and how.
      out: final directory.
      how: as for every stage.
    Raises: ConfigError, ModelError or CompressionError for what cannot be done, before anything is.
    """
    tokenizer, device = load_tokenizer(job.config.model), here().device
    text = _read(job, tokenizer)
    _check(job, tokenizer, text, device)
    ledger, key = Ledger(device), model_hash(job.config.model)
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as working:
        writer = ShardWriter(working, len(job.blocks) + 1)
        with ledger.phase(job.stage):
            if job.walks:
                assert text.calibration is not None
                fingerprint = config_hash({"stage": job.stage, "config": config_hash(job.config), "model": key})
                records = walk(job.blocks, text.calibration, job.method, job.options, writer, fingerprint, device)
            else:
                records = solve_stored(job.blocks, _moments(job), job.method, job.options, writer, device)
        with ledger.phase("saving"):
            metrics = _save(job, working, writer, records)
            metrics["calibration_tokens"] = text.calibration.tokens if text.calibration else 0
        with ledger.phase("comparison"):
            metrics |= _held_out(job, working, text)
        write_json(working / ERRORS, [record._asdict() for record in records])
        write_manifest(
            working, stage=job.stage, config=job.config, inputs={"model": key}, ledger=ledger.as_dict(), metrics=metrics
        )
        journal.remove(working)
    return Checkpoint(out)


def _read(job: Job, tokenizer: Any) -> _Text:
    """Calibration text and what is held out of it; a comparison that nobody set limits to may go without text."""
    config = job.config
    labels = label_ids(config.gate.labels, tokenizer)
    try:
        rows, apart = split_rows(config.calibration, tokenizer, config.model, config.gate.sequences)
    except ConfigError as error:
        if job.walks or any(limit is not None for limit in limits_of(config.gate).values()):
            raise
        if config.gate.sequences:
            console.print(f"{job.stage}: not compared with its source; {error}", highlight=False)
        return _Text(None, None, labels)
    return _Text(rows if job.walks else None, apart if config.gate.sequences else None, labels)


def _check(job: Job, tokenizer: Any, text: _Text, device: torch.device) -> None:
    """All that can be known before the first block."""
    ids = [rows.input_ids.flatten() for rows in (text.calibration, text.held_out) if rows is not None]
    vocab_size = job.blocks.config.get_text_config().vocab_size
    check_tokens(job.config.model, tokenizer, vocab_size, torch.cat(ids) if ids else None)
    job.method.check(job.blocks, list(_wanted(job)))
    if job.method.folds:
        if any("experts." in name for name in job.blocks.matrices()):
            raise CompressionError(
                "equalization: in a mixture the router reads the same normalisation as the experts, and what is left "
                "to equalise is attention alone; set equalization to none."
            )
        _check_folds(foldable(job.blocks, job.method, job.options, device))


def _wanted(job: Job) -> Iterator[Group]:
    """The groups of layers that the method works on, of all blocks."""
    for number, block in job.blocks.shapes():
        for group in groups_of(block, number):
            chosen = group.without(job.config.ignore)
            if chosen is not None and job.method.wants(chosen):
                yield chosen


def _check_folds(found: dict[str, bool]) -> None:
    """Say where factors have no normalisation to go to; attention's output and down have none in any model."""
    reading = {name: is_foldable for name, is_foldable in found.items() if name.endswith("_in")}
    if not any(found.values()):
        raise CompressionError(
            "equalization: no layer reads a normalisation that nothing else reads (post-norm, a router, ignored "
            "layers beside it), so factors would change the model; set equalization to none."
        )
    missing = [name.partition("layers.0.")[2] for name, is_foldable in reading.items() if not is_foldable]
    if missing:
        console.print(
            f"equalization: {', '.join(missing)} stay as they are, since something else reads their normalisation too.",
            highlight=False,
        )


def _moments(job: Job) -> Callable[[Group], Moments]:
    if job.needs_data and job.config.moments is not None:
        return StoredMoments(job.config.moments, job.config.model)
    return _unseen


def _unseen(group: Group) -> Moments:
    """Moments of no inputs: errors are then those of the weights themselves."""
    weight = next(iter(group.linears.values())).weight
    return Moments.of(weight.new_zeros(0, weight.shape[1]))


def _save(job: Job, working: Path, writer: ShardWriter, records: list[Record]) -> dict[str, Any]:
    stored_bytes = write_rest(job.blocks, writer)
    job.blocks.config.save_pretrained(working)
    copy_beside(job.config.model, working)
    return summary(records) | {"weight_bytes": stored_bytes} | job.finish(working, records)


def _held_out(job: Job, directory: Path, text: _Text) -> dict[str, Any]:
    """What the compressed model lost on text beside the calibration, and what it fails of its gate.

    Whatever goes wrong here, the model is written already, and stays.
    """
    if text.held_out is None:
        return {}
    try:
        # In float32 on any device: what is compared is smaller than bf16's rounding.
        before, after = (load_model(name, torch.float32) for name in (job.config.model, str(directory)))
        found = compare(before, after, text.held_out, text.labels)
        failures = check(found, job.config.gate)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        console.print(f"{job.stage}: written, but not compared ({reason}).", style="red", highlight=False)
        return {"gate_failures": [f"not compared: {reason}"]}
    if failures:
        console.print(f"{job.stage}: the model fails its gate: {'; '.join(failures)}", style="red", highlight=False)
    return {"held_out": found, "held_out_tokens": text.held_out.tokens, "gate_failures": failures}


def inputs_of(config: CompressConfig) -> dict[str, str]:
    """What a compression reads, as its manifest has it."""
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
        "errors_of": "outputs" if any(record.tokens for record in records) else "weights",
        "solve_seconds": sum(record.seconds for record in records),
        "layers_without_inputs": sum(record.tokens == 0 for record in records),
    }
