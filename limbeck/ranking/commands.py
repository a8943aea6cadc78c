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
)
RECOVER = Stage(
    name="rank recover",
    config=recover.RankRecoverConfig,
    run=recover.run,
    takes=_RESUMES,
    subject="prune",
)
EVALUATE = Stage(name="rank evaluate", config=evaluate.RankEvaluateConfig, run=evaluate.run, subject="model")
