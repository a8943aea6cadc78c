"""The commands that run stages in order."""

from __future__ import annotations

from limbeck.pipeline import command, ranking
from limbeck.pipeline.config import PipelineConfig
from limbeck.stage import Stage

PIPELINE = Stage(
    name="pipeline",
    config=PipelineConfig,
    run=command.run,
    takes=(),
    tell=command.tell,
    first=(
        "title",
        "generate",
        "traces",
        "verify",
        "cache.top_k",
        "distill",
        "sweep",
        "choose.min_retention",
        "recover",
        "quantize",
        "evaluate",
        "evaluate_teacher",
        "export",
        "smoke.max_mean_difference_nats",
        "card.name",
        "push_to_hub.repository",
    ),
    refers={
        "generate": "traces generate",
        "traces": "traces import",
        "verify": "traces verify",
        "distill": "distill",
        "sweep": "sweep",
        "recover": "recover",
        "quantize": "quantize",
        "evaluate": "evaluate",
        "export": "export",
    },
)
RANK_PIPELINE = Stage(
    name="rank pipeline",
    config=ranking.RankPipelineConfig,
    run=ranking.run,
    takes=(),
    first=(
        "teacher",
        "student",
        "kd_ratio",
        "listwise_ratio",
        "seeds",
        "cut.neuron_sparsity",
        "cut.rounds",
        "schemes",
        "group_size",
        "timed_requests",
    ),
    refers={"teacher": "rank train", "student": "rank train"},
)
