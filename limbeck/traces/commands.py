"""The commands on trace files."""

from __future__ import annotations

from rich.console import Console

from limbeck.stage import Stage, View
from limbeck.traces import generation, importing, probe, show, stats
from limbeck.traces.generation_cost import predict_generate

IMPORT = Stage(name="traces import", config=importing.ImportConfig, run=importing.run, loads=False)
GENERATE = Stage(
    name="traces generate",
    config=generation.GenerateConfig,
    run=generation.run,
    takes=("overwrite", "on"),
    predict=predict_generate,
    first=(
        "prompts.source",
        "prompts.format",
        "prompts.num_traces",
        "model",
        "server",
        "server_model",
        "sampling.max_new_tokens",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.num_samples",
        "sampling.batch_size",
        "sampling.seed",
        "on_bad",
    ),
)
PROBE = Stage(
    name="traces probe",
    config=probe.ProbeConfig,
    run=probe.run,
    first=(
        "traces.source",
        "traces.format",
        "traces.num_traces",
        "teacher",
    ),
)
SHOW = View(
    name="traces show",
    config=show.ShowConfig,
    run=show.run,
    first=(
        "traces.source",
        "traces.format",
        "traces.num_traces",
        "traces.split",
        "tokenizer",
        "num",
        "start",
        "truncation.policy",
        "truncation.lead_fraction",
        "truncation.budget_tokens",
        "truncation.keep_ending",
        "supervision.preset",
        "show_tokens",
    ),
)
STATS = View(
    name="traces stats",
    config=stats.StatsConfig,
    run=stats.run,
    show=lambda found: stats.print_stats(found, Console()),
    first=(
        "traces.source",
        "traces.format",
        "traces.num_traces",
        "traces.split",
        "tokenizer",
        "select.require_correct",
        "truncation.policy",
        "truncation.lead_fraction",
        "truncation.budget_tokens",
        "truncation.keep_ending",
    ),
)
