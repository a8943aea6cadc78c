"""The stage `traces import`: traces of any format in, limbeck's own JSONL with a manifest out."""

from __future__ import annotations

from dataclasses import asdict, field
from pathlib import Path

from limbeck.checkpoint import Checkpoint, hash_path, output_directory, write_manifest
from limbeck.config import checked
from limbeck.stage import How
from limbeck.traces.counts import tell
from limbeck.traces.select import SelectConfig, select_traces
from limbeck.traces.sources import TraceConfig, path_of, read_traces
from limbeck.traces.trace import write_jsonl


@checked
class ImportConfig:
    """Which traces, and which of them are kept."""

    traces: TraceConfig
    """Where the traces come from."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which traces are used."""


def run(config: ImportConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `traces.jsonl` and a manifest into `out`."""
    traces, read = read_traces(config.traces)
    selected, counts = select_traces(traces, config.select)
    tell([*read.lines(), *counts.lines()])
    source = path_of(config.traces.source)
    with output_directory(out, overwrite=how.overwrite) as working:
        write_jsonl(selected, working / "traces.jsonl")
        write_manifest(
            working,
            stage="traces import",
            config=config,
            inputs={"traces": hash_path(source)} if source.exists() else {},
            metrics={
                "read": read.read,
                "kept": counts.kept,
                "skipped": read.skipped,
                "dropped": sum(counts.dropped.values()),
            },
            counts={"read": asdict(read), "selected": asdict(counts)},
        )
    return Checkpoint(out)
