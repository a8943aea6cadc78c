"""The stage `rank recover`: prune a scorer and distil it in turns, with its AUC beside its size after every step.

    model -> round 1: prune to 1/n of the target, train 1/n of the steps -> ... -> round n: at the target

The ranking twin of `limbeck recover`: the same cuts, planned from the unpruned model, and the training of `rank train`.
Layers are calibrated on the run's own pairs, since scorers are pruned best on what they read in service.

    OUT/calibration.txt   OUT/round-1/pruned/   OUT/round-1/recovered/   OUT/round-2/ ...   OUT/rounds.json

The last round's `recovered` is the result; OUT itself holds the table and the manifest.

Source: 2502.14305, section on pruning with distillation: cutting in stages won back more AUC than a single cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.checkpoint import STATE_PREFIX, Checkpoint, output_directory, write_json, write_manifest
from limbeck.compress.calibrate import CalibrationConfig
from limbeck.compress.prune import stage as prune
from limbeck.compress.prune.stage import SOLVERS, PruneConfig
from limbeck.compress.rounds import claim, once, plan_cuts
from limbeck.config import completed_by
from limbeck.distill.config import StudentConfig, TrainingConfig
from limbeck.distill.parallel import join
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger
from limbeck.models.load import load_tokenizer, model_hash
from limbeck.progress import console
from limbeck.ranking import train
from limbeck.ranking.data import read_requests
from limbeck.ranking.examples import plan_requests
from limbeck.ranking.featurize import encode_requests, write_request
from limbeck.ranking.train import RankTrainConfig
from limbeck.stage import How

STATE = STATE_PREFIX + "rank-recover.json"
TABLE, CALIBRATION = "rounds.json", "calibration.txt"
_CALIBRATION_REQUESTS = 512
_SEED_STRIDE = 1_000_003
"""Between the seeds of two rounds, so that each sees the requests in another order."""


def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe with what it need not say: student, teacher, data and features."""
    cut, rank = tree.get("prune"), tree.get("rank")
    if not isinstance(cut, Mapping) or not isinstance(rank, Mapping):
        return tree
    named = {"model": cut.get("model")}
    student, teacher = rank.get("student") or {}, rank.get("teacher") or {}
    teacher = teacher if teacher.get("model") else {**teacher, **named}
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
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1; found {self.rounds}")
        if self.rank.student.model != self.prune.model:
            raise ConfigError(f"rank.student: recovery trains prune.model ({self.prune.model}); leave the student out")
        if self.prune.moments is not None and self.rounds > 1:
            raise ConfigError("prune.moments are those of the unpruned model; with more than one round, leave them out")
        if self.prune.method in SOLVERS and self.rank.lora is not None:
            raise ConfigError("rank.lora: merging adapters fills the zeros of a sparse model; leave it out")


def run(config: RankRecoverConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Do all rounds; returns the table's last row beside that of the unpruned model. Arguments as for `rank train`.

    Raises: ConfigError when a round would remove nothing, and what pruning and training raise.
    """
    if join().world_size > 1:
        raise ConfigError("limbeck rank recover runs in one process; on several, call prune and rank train in turn.")
    with output_directory(out, overwrite=how.overwrite, resume=how.resume) as working:
        claim(working / STATE, config, config.prune.model)
        cuts, trainings = plan_cuts(config.prune, config.rounds), _trainings(config)
        calibration = _calibration(config, working)
        rows = [once(working / "unpruned.json", partial(_held_out, config, config.prune.model))]
        model, ledger = config.prune.model, Ledger()
        for number, (cut, training) in enumerate(zip(cuts, trainings, strict=True), start=1):
            directory = working / f"round-{number}"
            pruned, recovered = directory / "pruned", directory / "recovered"
            if not Checkpoint(pruned).is_finished:
                prune.run(replace(cut, model=model, calibration=calibration), pruned, how=How(resume=True))
            if not Checkpoint(recovered).is_finished:
                student = StudentConfig(model=str(pruned), keep_zeros=config.prune.method in SOLVERS)
                train.run(replace(config.rank, student=student, training=training), recovered, how=How(resume=True))
            rows.append(once(directory / "round.json", partial(_row, config, pruned, recovered)))
            for part in (pruned, recovered):
                ledger.restore(Checkpoint(part).manifest["ledger"])
            _say(number, rows[-1])
            model = str(recovered)
        write_json(working / TABLE, rows)
        metrics = {"unpruned": rows[0], "rounds": rows[1:], **rows[-1]}
        inputs = {"model": model_hash(config.prune.model), **train.inputs_of(config.rank)}
        write_manifest(
            working, stage="rank recover", config=config, inputs=inputs, ledger=ledger.as_dict(), metrics=metrics
        )
        (working / "unpruned.json").unlink()
        (working / STATE).unlink()
    return Checkpoint(out)


def _own_data(model: Any) -> dict[str, Any]:
    """Data and features of a scorer, by its manifest."""
    if not isinstance(model, str) or not Checkpoint(Path(model)).is_finished:
        return {}
    config = Checkpoint(Path(model)).manifest["config"]
    return {name: config[name] for name in ("data", "features") if name in config}


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
            seed=(training.seed + _SEED_STRIDE * number) % 2**32,
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


def _row(config: RankRecoverConfig, pruned: Path, recovered: Path) -> dict[str, Any]:
    cut, trained = Checkpoint(pruned).manifest, Checkpoint(recovered).manifest
    sizes = ("parameters", "neurons", "kv_groups", "sparsity")
    before = _held_out(config, str(pruned))
    return {
        **{key: cut["metrics"][key] for key in sizes if key in cut["metrics"]},
        **{f"pruned_{name}": value for name, value in before.items()},
        **_held_out(config, str(recovered)),
        "steps": trained["ledger"]["steps"],
        "train_seconds": trained["ledger"]["train_seconds"],
    }


def _held_out(config: RankRecoverConfig, model: str) -> dict[str, Any]:
    found = train.measure(config.rank, model)
    names = ("auc", "auc_low", "auc_high", "request_auc", "log_loss", "calibration_error")
    return {name: found.get(name) for name in names}


def _say(number: int, row: Mapping[str, Any]) -> None:
    console.print(
        f"round {number}: {row.get('parameters', 0):,} parameters; held-out AUC {row['pruned_auc']:.4f} -> "
        f"{row['auc']:.4f}, log-loss {row['pruned_log_loss']:.4f} -> {row['log_loss']:.4f}",
        highlight=False,
    )
