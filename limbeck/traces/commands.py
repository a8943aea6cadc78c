"""The commands on trace files."""

from __future__ import annotations

from rich.console import Console

from limbeck.stage import Stage, View
from limbeck.traces import generation, importing, probe, show, stats
from limbeck.traces.generation_cost import predict_generate

IMPORT = Stage(name="traces import", config=importing.ImportConfig, run=importing.run)
GENERATE = Stage(
    name="traces generate",
    config=generation.GenerateConfig,
    run=generation.run,
    takes=("overwrite", "on"),
    predict=predict_generate,
)
PROBE = Stage(name="traces probe", config=probe.ProbeConfig, run=probe.run)
SHOW = View(name="traces show", config=show.ShowConfig, run=show.run)
STATS = View(
    name="traces stats",
    config=stats.StatsConfig,
    run=stats.run,
    show=lambda found: stats.print_stats(found, Console()),
)
