"""The commands that train, prune and measure scorers."""

from __future__ import annotations

from limbeck.ranking import evaluate, recover, train
from limbeck.stage import Stage

_RESUMES = ("overwrite", "resume")

TRAIN = Stage(
    name="rank train",
    config=train.RankTrainConfig,
    run=train.run,
    takes=_RESUMES,
    inputs=train.inputs_of,
    subject="student",
    first=(
        "student.model",
        "teacher.model",
        "data.source",
        "data.path",
        "data.fields",
        "features.instruction",
        "features.candidate",
        "features.labels",
        "loss.kd_ratio",
        "ranking.support",
        "ranking.listwise_ratio",
        "optimizer.learning_rate",
        "training.epochs",
        "training.batch_size",
        "training.seed",
    ),
)
RECOVER = Stage(
    name="rank recover",
    config=recover.RankRecoverConfig,
    run=recover.run,
    takes=_RESUMES,
    subject="prune",
    refers={"prune": "prune", "rank": "rank train"},
)
EVALUATE = Stage(
    name="rank evaluate",
    config=evaluate.RankEvaluateConfig,
    run=evaluate.run,
    subject="model",
    first=(
        "model",
        "reference",
        "like",
        "part",
        "data.source",
        "data.path",
        "features.labels",
        "k",
        "seed",
    ),
)
