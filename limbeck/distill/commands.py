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
    first=(
        "student.model",
        "teacher.model",
        "teacher.cache",
        "teacher.server",
        "traces.source",
        "traces.num_traces",
        "num_validation",
        "truncation.policy",
        "truncation.lead_fraction",
        "truncation.keep_ending",
        "supervision.preset",
        "loss.divergence.name",
        "loss.kd_ratio",
        "loss.temperature",
        "optimizer.name",
        "optimizer.learning_rate",
        "schedule.name",
        "training.epochs",
        "training.max_steps",
        "training.batch_size",
        "training.precision",
        "training.seed",
        "training.keep_best",
        "lora.rank",
        "on_policy.start_fraction",
    ),
)
CACHE = Stage(
    name="teacher cache",
    config=caching.CacheStageConfig,
    run=caching.run,
    takes=("on",),
    predict=predict_cache,
    subject="teacher",
    first=(
        "teacher",
        "traces.source",
        "traces.num_traces",
        "select.require_correct",
        "truncation.policy",
        "truncation.lead_fraction",
        "segments",
        "cache.mode",
        "cache.top_k",
    ),
)
