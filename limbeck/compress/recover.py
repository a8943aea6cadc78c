"""The stage `recover`: prune and distil in turns, so that a smaller model learns again what pruning broke.

    model -> round 1: prune to 1/n of the target, train on 1/n of the tokens -> ... -> round n: at the target

One round is one-shot pruning; more are gradual. Sizes are computed from the unpruned model, so that every number of
rounds ends at the same one. Each round's training has its own schedule, its own order of the traces, and the pruned
model's zeros held where single weights were pruned.

    OUT/round-1/pruned/   OUT/round-1/recovered/   OUT/round-1/round.json   OUT/round-2/ ...   OUT/ the recovered model

The last round's model is OUT itself; its own directory keeps the manifest and the metrics.

Source: 2502.14305, section on pruning with distillation: cutting in stages won back more than a single cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.checkpoint import MANIFEST, STATE_PREFIX, Checkpoint, output_directory, write_manifest
from limbeck.compress.masks import MASK_FILE
from limbeck.compress.prune import stage as prune
from limbeck.compress.prune.stage import SOLVERS, PruneConfig
from limbeck.compress.rounds import Round, claim, once, plan_rounds, round_patterns
from limbeck.compress.weights import INDEX, ShardWriter
from limbeck.config import completed_by
from limbeck.distill import train
from limbeck.distill.config import DistillConfig, LossConfig, StudentConfig, TeacherConfig
from limbeck.distill.parallel import join
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger
from limbeck.progress import console
from limbeck.stage import How

STATE = STATE_PREFIX + "recover.json"
RECORD = "round.json"
_STAYS = (MANIFEST, "metrics.jsonl")
"""What the last round's directory keeps when its model becomes the output."""


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe with what it need not say: student, teacher and calibration text."""
    cut, distill = tree.get("prune"), tree.get("distill")
    if not isinstance(cut, Mapping) or not isinstance(distill, Mapping):
        return tree
    named = {"model": cut.get("model")}
    student, teacher = distill.get("student") or {}, distill.get("teacher") or {}
    calibration = cut.get("calibration") or {}
    if not any(teacher.get(key) for key in ("model", "cache", "server")):
        teacher = {**teacher, **named}
    if not calibration.get("traces") and not calibration.get("text"):
        calibration = {"render": distill.get("render") or {}, **calibration, "traces": distill.get("traces")}
    return {
        **tree,
        "prune": {**cut, "calibration": calibration},
        "distill": {**distill, "student": {**named, **student}, "teacher": teacher},
    }


@completed_by(completed)
class RecoverConfig:
    """Prune a model and train it back, at once or in turns.

    In a recipe the model is named once, as prune.model: distill.student is filled in with it, and so is distill.teacher
    where none is named. The layers are calibrated on distill.traces where prune.calibration names no text.
    """

    prune: PruneConfig
    """The model, and what is removed in all."""
    distill: DistillConfig
    """How it is trained; its steps, tokens or epochs are those of all rounds together."""
    rounds: int = 1
    """1: prune once, then train. n: n times an n-th of the cut, then an n-th of the tokens."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1; found {self.rounds}")
        if self.distill.student.model != self.prune.model:
            raise ConfigError(
                f"distill.student: recovery trains prune.model ({self.prune.model}); leave the student out"
            )
        if self.prune.moments is not None and self.rounds > 1:
            raise ConfigError("prune.moments are those of the unpruned model; with more than one round, leave them out")
        if self.is_sparse:
            round_patterns(self.prune.pattern, self.rounds)
            if self.distill.lora is not None:
                raise ConfigError("distill.lora: merging adapters fills the zeros of a sparse model; leave it out")

    @property
    def is_sparse(self) -> bool:
        """Whether single weights are pruned, whose zeros are then held."""
        return self.prune.method in SOLVERS


def run(config: RecoverConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Do all rounds and write the recovered model.

    Args:
      config: what is cut and how it is trained.
      out: directory to write; work happens in `<out>.partial`.
      how: resume goes on with an interrupted run of the same config: finished rounds stay, the one under way goes on.
    Raises: ConfigError when a round would remove nothing, and what pruning and distilling raise.
    """
    if join().world_size > 1:
        raise ConfigError(
            "limbeck recover runs in one process; on several, call limbeck prune and limbeck distill in turn."
        )
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as working:
        claim(working / STATE, config, config.prune.model)
        rounds = plan_rounds(config.prune, config.distill, config.rounds)
        start = once(working / "unpruned.json", partial(_held_out, config, config.prune.model))
        model, records = config.prune.model, []
        for number, planned in enumerate(rounds, start=1):
            directory = working / f"round-{number}"
            record = once(directory / RECORD, partial(_round, config, planned, model, directory))
            _say(number, record)
            records.append(record)
            model = str(directory / "recovered")
        _finish(config, working, start, records)
    return Checkpoint(out)


def _round(config: RecoverConfig, planned: Round, model: str, directory: Path) -> dict[str, Any]:
    """Prune, train, and compare on held-out sequences; what is finished already is not done again."""
    pruned, recovered = directory / "pruned", directory / "recovered"
    if not Checkpoint(pruned).is_finished:
        prune.run(replace(planned.prune, model=model), pruned, how=How(resume=True))
    if not Checkpoint(recovered).is_finished:
        student = StudentConfig(model=str(pruned), keep_zeros=config.is_sparse)
        train.run(replace(planned.distill, student=student), recovered, how=How(resume=True))
    cut, trained = Checkpoint(pruned).manifest, Checkpoint(recovered).manifest
    return {
        **{
            key: cut["metrics"][key]
            for key in ("parameters", "neurons", "kv_groups", "sparsity")
            if key in cut["metrics"]
        },
        "pruned": _held_out(config, str(pruned)),
        "recovered": _held_out(config, str(recovered)),
        "tokens": trained["ledger"]["tokens"],
        "flops": trained["ledger"]["flops"]["total"],
        "prune_seconds": sum(cut["ledger"]["seconds"].values()),
        "train_seconds": trained["ledger"]["train_seconds"],
        "kept_step": trained["metrics"].get("kept_step"),
        "steps": trained["ledger"]["steps"],
    }


def _held_out(config: RecoverConfig, model: str) -> dict[str, float | None]:
    """Held-out CE and forward KL at temperature 1, whatever the loss: to the teacher, or else to the unpruned model."""
    teacher = TeacherConfig(model=config.distill.teacher.model or config.prune.model)
    loss = LossConfig(kd_ratio=0.5, chunk_bytes=config.distill.loss.chunk_bytes)
    asked = replace(config.distill, teacher=teacher, loss=loss, on_policy=None, lora=None)
    found = train.measure(asked, model)
    return {"ce": found["validation_ce"], "kl": found["validation_kd"]}


def _finish(
    config: RecoverConfig, working: Path, start: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Move the last round's model to the top, its mask beside it, and write the manifest."""
    last = working / f"round-{len(records)}"
    ledger = Ledger()
    for number in range(1, len(records) + 1):
        for part in ("pruned", "recovered"):
            ledger.restore(Checkpoint(working / f"round-{number}" / part).manifest["ledger"])
    for file in sorted((last / "recovered").iterdir()):
        if file.name not in _STAYS:
            file.replace(working / file.name)
    if config.is_sparse:
        _add_mask(working, last / "pruned" / MASK_FILE)
    metrics = {
        "parameters": records[-1]["parameters"],
        "validation_ce": records[-1]["recovered"]["ce"],
        "validation_kl": records[-1]["recovered"]["kl"],
        "unpruned": start,
        "rounds": records,
    }
    write_manifest(
        working,
        stage="recover",
        config=config,
        inputs=train.inputs_of(config.distill),
        ledger=ledger.as_dict(),
        metrics=metrics,
    )
    (working / "unpruned.json").unlink()
    (working / STATE).unlink()
    return metrics


def _add_mask(directory: Path, mask: Path) -> None:
    """The mask, and an index: without one vLLM takes every safetensors file for weights."""
    if not (directory / INDEX).exists():
        writer = ShardWriter(directory, 1)
        if (directory / "model.safetensors").exists():
            (directory / "model.safetensors").replace(writer.path(0))
        writer.finish()
    (directory / MASK_FILE).write_bytes(mask.read_bytes())


def _say(number: int, record: Mapping[str, Any]) -> None:
    before, after = record["pruned"], record["recovered"]
    if before["kl"] is None:
        return
    console.print(
        f"round {number}: {record['parameters']:,} parameters; held-out KL {before['kl']:.4f} -> {after['kl']:.4f}, "
        f"CE {before['ce']:.4f} -> {after['ce']:.4f}",
        highlight=False,
    )
