"""The commands that run stages in order."""

from __future__ import annotations

from limbeck.pipeline import command
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
        "ranking.teacher",
        "ranking.student",
        "ranking.seeds",
        "ranking.cut.neuron_sparsity",
        "ranking.schemes",
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
        "ranking.teacher": "rank train",
        "ranking.student": "rank train",
    },
)
