"""The commands that serve a model, and measure a server."""

from __future__ import annotations

from limbeck.serve import bench, command
from limbeck.serve.config import ServeConfig
from limbeck.stage import Stage, View

SERVE = View(
    name="serve",
    loads=True,
    config=ServeConfig,
    run=command.run,
    predict=command.check,
    subject="model",
    first=(
        "model",
        "engine",
        "host",
        "port",
        "name",
        "api_key",
        "precision",
        "context_tokens",
        "schedule",
        "k",
        "labels",
        "num_threads",
        "speculative.draft",
        "generation.max_running",
        "limits.waiting",
        "limits.seconds",
    ),
)
BENCH = Stage(name="bench serve", config=bench.BenchServeConfig, run=bench.run, subject="model")
