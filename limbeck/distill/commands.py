"""The commands that train a student and ask its teacher once for all runs."""

from __future__ import annotations

from limbeck.distill import caching, train
from limbeck.distill.caching_cost import predict_cache
from limbeck.distill.config import DistillConfig
from limbeck.distill.output import inputs_of
from limbeck.distill.predict import predict_distill
from limbeck.stage import Stage

DISTILL = Stage(
    name="distill",
    config=DistillConfig,
    run=train.run,
    takes=("overwrite", "resume"),
    inputs=inputs_of,
    predict=predict_distill,
    subject="student",
)
CACHE = Stage(
    name="teacher cache",
    config=caching.CacheStageConfig,
    run=caching.run,
    takes=("on",),
    predict=predict_cache,
    subject="teacher",
)
