"""What a run of the distillation loop writes beside its states: model, metrics, and what its manifest says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.checkpoint import Checkpoint, hash_path
from limbeck.distill.config import DistillConfig, LoopConfig, teachers_of
from limbeck.distill.setup import Run
from limbeck.errors import CheckpointError
from limbeck.models.anatomy import causal_lm_of
from limbeck.models.load import model_hash, quiet
from limbeck.teacher.cache import Spec
from limbeck.traces.sources import path_of


def write_model(setup: Run, directory: Path) -> None:
    """Write model and tokenizer as a Hugging Face directory, adapters merged."""
    with setup.ledger.phase("saving"), quiet():
        is_adapted, model = setup.config.lora is not None, setup.student.model
        model = model.merge_and_unload() if is_adapted else causal_lm_of(model)
        model.save_pretrained(directory)
        setup.student.tokenizer.save_pretrained(directory)


def metrics_of(config: LoopConfig, kept: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest tells of the step whose weights were written."""
    metrics = {"loss": kept.get("loss"), "validation_ce": kept.get("validation_ce")}
    if config.training.keep_best is not None:
        metrics |= {"validation_kd": kept.get("validation_kd"), "kept_step": kept["step"]}
    if "rollout_mismatch_nats" in kept:
        metrics["rollout_mismatch_nats"] = kept["rollout_mismatch_nats"]
    return metrics


def inputs_of(config: DistillConfig) -> dict[str, str]:
    """What a run reads, by role, as hashes of the files: student, teachers or their caches, traces."""
    names = {"student": config.student.model}
    found = {}
    for number, teacher in enumerate(teachers_of(config), 1):
        role = "teacher" if number == 1 else f"teacher_{number}"
        names[role] = teacher.model
        if teacher.cache is not None:
            # What a cache says of a sequence depends on teacher and form alone, not on what else it holds.
            found[f"{role}_cache"] = Spec.read(teacher.cache).identity
        if teacher.server is not None:
            found[f"{role}_server"] = f"{teacher.server} {teacher.server_model or 'its only model'}"
    found |= {role: model_hash(name) for role, name in names.items() if name is not None}
    for number, source in enumerate(config.all_sources, 1):
        traces = path_of(source.traces.source)
        if traces.exists():
            found["traces" if number == 1 else f"traces_{number}"] = hash_path(traces)
    return found


def costs_of_traces(config: DistillConfig) -> Iterator[Mapping[str, Any]]:
    """The ledgers of `limbeck traces complete` where traces are its own: a student wrote them for this run."""
    for source in dict.fromkeys(path_of(source.traces.source) for source in config.all_sources):
        made = Checkpoint(source if source.is_dir() else source.parent)
        if source.exists() and made.is_finished and made.manifest["stage"] == "traces complete":
            yield made.cost


def keep_lines(path: Path, count: int) -> None:
    """Drop what an interrupted run logged after the state it goes on from."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if path.exists() else []
    if len(lines) < count:
        raise CheckpointError(f"{path}: {len(lines)} lines, but the saved state is of step {count}; run anew.")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)
