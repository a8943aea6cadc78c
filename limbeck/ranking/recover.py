"""The stage `rank recover`: prune a scorer and distil it in turns, with its AUC beside its size after every round.

The turns are those of `limbeck recover` (`compress.turns`), the training is that of `rank train`. Layers are calibrated
on the run's own pairs (OUT/calibration.txt), since scorers are pruned best on what they read in service.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from limbeck.checkpoint import Checkpoint
from limbeck.compress import turns
from limbeck.compress.calibrate import CalibrationConfig
from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.rounds import SEED_STRIDE, Round, plan_cuts
from limbeck.config import completed_by, to_dict
from limbeck.distill.config import StudentConfig, TrainingConfig
from limbeck.errors import ConfigError
from limbeck.models.load import load_tokenizer, model_hash
from limbeck.ranking import train
from limbeck.ranking.data import read_requests, training_of
from limbeck.ranking.examples import plan_requests
from limbeck.ranking.featurize import encode_requests, write_request
from limbeck.ranking.train import RankTrainConfig
from limbeck.stage import How

CALIBRATION = "calibration.txt"
_CALIBRATION_REQUESTS = 512
_MEASURES = ("auc", "auc_low", "auc_high", "request_auc", "log_loss", "calibration_error")


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe with what it need not say: student, teacher, data and features."""
    cut, rank = tree.get("prune"), tree.get("rank")
    if not isinstance(cut, Mapping) or not isinstance(rank, Mapping):
        return tree
    named = {"model": cut.get("model")}
    student, teacher = rank.get("student") or {}, rank.get("teacher") or {}
    is_named = any(teacher.get(kind) for kind in ("model", "cache", "server", "scores"))
    teacher = teacher if is_named else {**teacher, **named}
    return {
        **tree,
        "rank": {**_own_data(cut.get("model")), **rank, "student": {**named, **student}, "teacher": teacher},
    }


@completed_by(completed)
class RankRecoverConfig:
    """Prune a scorer and train it back, at once or in turns.

    In a recipe the model is named once, as prune.model: rank.student is filled in with it, and so is rank.teacher where
    none is named. Data and features are those that the model was trained on where rank.data names none.
    """

    prune: PruneConfig
    """The model, and what is removed in all."""
    rank: RankTrainConfig
    """How it is trained; its steps or epochs are those of all rounds together."""
    rounds: int = 1
    """1: prune once, then train. n: n times an n-th of the cut, then an n-th of the steps."""

    def __post_init__(self) -> None:
        turns.check_turns(self.prune, self.rounds, self.rank.student.model, self.rank.lora is not None, "rank")


def run(config: RankRecoverConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Do all rounds and write the recovered scorer; see `turns.recover`."""
    return turns.recover(TrainedBack(config), out, how)


@dataclass(frozen=True, slots=True)
class TrainedBack:
    """Recovery of a scorer, measured on held-out requests."""

    stage: ClassVar[str] = "rank recover"
    trainer: ClassVar[str] = "rank train"

    config: RankRecoverConfig

    @property
    def identity(self) -> Mapping[str, Any]:
        # Rounds were recorded in another form once; such a run is not gone on with.
        return {"config": to_dict(self.config), "records": 2}

    def turns(self, working: Path) -> list[Round]:
        calibration = _calibration(self.config, working)
        cuts, trainings = plan_cuts(self.config.prune, self.config.rounds), _trainings(self.config)
        return [
            Round(replace(cut, calibration=calibration), replace(self.config.rank, training=training))
            for cut, training in zip(cuts, trainings, strict=True)
        ]

    def train(self, turn: Round, student: StudentConfig, out: Path) -> None:
        train.run(replace(turn.training, student=student), out, how=How(resume=True))

    def measure(self, model: str) -> dict[str, Any]:
        found = train.measure(self.config.rank, model)
        return {name: found.get(name) for name in _MEASURES}

    def inputs(self) -> dict[str, str]:
        return {"model": model_hash(self.config.prune.model), **train.inputs_of(self.config.rank)}

    def summary(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        return dict(measured)

    def line(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        return (
            f"held-out AUC {before['auc']:.4f} -> {after['auc']:.4f}, log-loss {before['log_loss']:.4f} -> "
            f"{after['log_loss']:.4f}"
        )


def _own_data(model: Any) -> dict[str, Any]:
    """Data and features of a scorer, by its manifest."""
    if not isinstance(model, str) or not Checkpoint(Path(model)).is_finished:
        return {}
    trained = training_of(Checkpoint(Path(model)))
    return {name: trained[name] for name in ("data", "features") if name in trained}


def _trainings(config: RankRecoverConfig) -> list[TrainingConfig]:
    """The steps of the whole run, split evenly; each round has a schedule and an order of its own."""
    training = config.rank.training
    split, _ = read_requests(config.rank.data)
    requests, _ = encode_requests(split.train, load_tokenizer(config.prune.model), config.rank.features)
    total = len(plan_requests(requests, training))
    if total < config.rounds:
        raise ConfigError(f"rank.training has {total} steps, fewer than the {config.rounds} rounds; train for longer")
    ends = np.linspace(0, total, config.rounds + 1).round().astype(int)
    return [
        replace(
            training,
            max_steps=int(steps),
            max_tokens=None,
            seed=(training.seed + SEED_STRIDE * number) % 2**32,
        )
        for number, steps in enumerate(np.diff(ends))
    ]


def _calibration(config: RankRecoverConfig, working: Path) -> CalibrationConfig:
    """The config's own calibration text, or the latest training pairs of the run as one."""
    own = config.prune.calibration
    if own.text is not None or own.traces is not None:
        return own
    split, _ = read_requests(config.rank.data)
    pairs = []
    for request in split.train[-_CALIBRATION_REQUESTS:]:
        text = write_request(request, config.rank.features)
        for added, candidate in zip(text.candidates, request.candidates, strict=True):
            pairs.append(text.prefix + added + config.rank.features.labels[0 if candidate.label else 1])
    path = working / CALIBRATION
    path.write_text("\n\n".join(pairs), encoding="utf-8")
    return replace(own, text=path)
