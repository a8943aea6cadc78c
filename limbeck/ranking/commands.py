"""The commands that train, prune and measure scorers."""

from __future__ import annotations

from limbeck.ranking import caching, evaluate, recover, show, train
from limbeck.stage import Stage, View

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
        "data.fields.member",
        "data.fields.item",
        "data.fields.label",
        "data.signals",
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
CACHE = Stage(
    name="rank cache",
    config=caching.RankCacheConfig,
    run=caching.run,
    takes=("on",),
    subject="teacher",
    first=("teacher", "data.source", "data.path", "features.instruction", "features.labels", "cache.mode"),
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
        "baselines",
        "slices",
        "data.source",
        "data.path",
        "features.labels",
        "k",
        "seed",
    ),
)
SHOW = View(
    name="rank show",
    config=show.ShowRequestsConfig,
    run=show.run,
    show=show.print_requests,
    as_dict=show.Shown.as_dict,
    subject="model",
    first=("model", "data.source", "data.path", "features.instruction", "features.labels", "part", "start", "num"),
    reads=show.from_recipe,
)
