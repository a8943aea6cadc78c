"""The stage `recover`: prune and distil in turns (`turns`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from limbeck.checkpoint import Checkpoint
from limbeck.compress import turns
from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.rounds import Round, plan_rounds
from limbeck.config import completed_by, to_dict
from limbeck.distill import train
from limbeck.distill.config import DistillConfig, LossConfig, StudentConfig, TeacherConfig
from limbeck.stage import How


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe with what it need not say: student, teacher and calibration text."""
    cut, distill = tree.get("prune"), tree.get("distill")
    if not isinstance(cut, Mapping) or not isinstance(distill, Mapping):
        return tree
    named = {"model": cut.get("model")}
    student, teacher = distill.get("student") or {}, distill.get("teacher") or {}
    calibration = cut.get("calibration") or {}
    if not _says(teacher, "model", "cache", "server"):
        teacher = {**teacher, **named}
    if not _says(calibration, "traces", "text"):
        calibration = {"render": distill.get("render") or {}, **calibration, "traces": distill.get("traces")}
    return {
        **tree,
        "prune": {**cut, "calibration": calibration},
        "distill": {**distill, "student": {**named, **student}, "teacher": teacher},
    }


def _says(tree: Mapping[str, Any], *keys: str) -> bool:
    return any(tree.get(key) for key in keys)


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
        turns.check_turns(self.prune, self.rounds, self.distill.student.model, self.distill.lora is not None, "distill")


def run(config: RecoverConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Do all rounds and write the recovered model; see `turns.recover`."""
    return turns.recover(DistilledBack(config), out, how)


@dataclass(frozen=True, slots=True)
class DistilledBack:
    """Recovery by distillation, measured on held-out sequences."""

    stage: ClassVar[str] = "recover"
    trainer: ClassVar[str] = "distill"

    config: RecoverConfig

    @property
    def identity(self) -> Mapping[str, Any]:
        return to_dict(self.config)

    def turns(self, working: Path) -> list[Round]:
        return plan_rounds(self.config.prune, self.config.distill, self.config.rounds)

    def train(self, turn: Round, student: StudentConfig, out: Path) -> None:
        train.run(replace(turn.training, student=student), out, how=How(resume=True))

    def measure(self, model: str) -> dict[str, float | None]:
        """CE and forward KL at temperature 1, whatever the loss: to the teacher, or else to the unpruned model."""
        distill = self.config.distill
        teacher = TeacherConfig(model=distill.teacher.model or self.config.prune.model)
        loss = LossConfig(kd_ratio=0.5, chunk_bytes=distill.loss.chunk_bytes)
        found = train.measure(replace(distill, teacher=teacher, loss=loss, on_policy=None, lora=None), model)
        return {"ce": found["validation_ce"], "kl": found["validation_kd"]}

    def inputs(self) -> dict[str, str]:
        return train.inputs_of(self.config.distill)

    def summary(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        return {"validation_ce": measured["ce"], "validation_kl": measured["kl"]}

    def line(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
        if before["kl"] is None:
            return None
        return f"held-out KL {before['kl']:.4f} -> {after['kl']:.4f}, CE {before['ce']:.4f} -> {after['ce']:.4f}"
