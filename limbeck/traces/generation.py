"""The stage `traces generate`: prompts in, sampled traces out; interrupted at any moment, it goes on when restarted.

1. Read the prompts of a source; equal prompts are one.
2. A writer (a local model or a server) makes the samples; each goes to a journal on disk when it is done.
3. Thought and answer are read from the journal's records, in the order of prompts and samples, and written under a
   temporary name that is then renamed. What cannot be used goes to `skipped.jsonl` and is counted by reason.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field, replace
from pathlib import Path
from typing import Any, Literal

from limbeck.checkpoint import STATE_PREFIX, Checkpoint, output_directory, write_json, write_manifest
from limbeck.client import Client, ClientConfig, api_key, server_root
from limbeck.config import checked, config_hash, to_dict
from limbeck.engine.sampling import SeededSampling
from limbeck.errors import ConfigError, LimbeckError, TraceFormatError
from limbeck.progress import bar
from limbeck.stage import How, Place
from limbeck.traces.counts import tell
from limbeck.traces.journal import Journal
from limbeck.traces.render import RenderConfig
from limbeck.traces.rendering import fitting_prompts
from limbeck.traces.select import deduplicate
from limbeck.traces.sources import TraceConfig, read_problems
from limbeck.traces.thought import Markers, Thought, join_thought, split_thought, unclosed_thought
from limbeck.traces.trace import Trace, write_jsonl
from limbeck.traces.writers import LocalWriter, Records, ServedWriter, Writer

TRACES_FILE, SKIPPED_FILE = "traces.jsonl", "skipped.json"
JOURNAL_FILE = STATE_PREFIX + "journal.jsonl"
"""Named as a state, so that a failed run leaves it behind."""


@checked
class GenerateConfig:
    """Which prompts, and who answers them."""

    prompts: TraceConfig
    """Where the prompts come from: any source of traces; thoughts and answers in it are not used, references are."""
    model: str | None = None
    """Directory, alias or hub id of a model that is sampled in this process."""
    server: str | None = None
    """Address of an OpenAI-compatible server instead (http://HOST:PORT)."""
    server_model: str | None = None
    """The model's name at the server; null takes the only one there."""
    sampling: SeededSampling = field(default_factory=SeededSampling)
    """Samples a prompt, temperature, top-p, length and seed."""
    group_prompts: int = 64
    """Prompts that a local model answers between two writes to the journal: what an interruption can cost."""
    on_bad: Literal["skip", "keep"] = "skip"
    """Outputs without a thought, or cut by the length limit: leave them out, or keep them."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How prompts become tokens, and the markers around the thought."""
    client: ClientConfig = field(default_factory=ClientConfig)
    """How a server is asked."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.server is None):
            raise ConfigError("set exactly one of model and server")
        if self.server is not None:
            server_root(self.server)
        if self.group_prompts < 1:
            raise ConfigError(f"group_prompts must be at least 1; found {self.group_prompts}")


def run(config: GenerateConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `traces.jsonl`, `skipped.json` and a manifest into `out`.

    Started again after an interruption it goes on; started again after its end, with the same config, it does nothing.
    Raises: LimbeckError when no usable trace was made, or the server does not answer; what was made is kept.
    """
    if how.on == "ray" and config.server is not None:
        raise ConfigError("--on ray: a server does its own work and is asked from here; leave --on out, or set model.")
    if (
        not how.overwrite
        and Checkpoint(out).is_finished
        and Checkpoint(out).manifest["config_hash"] == config_hash(config)
    ):
        return Checkpoint(out)
    prompts, num_duplicates = read_prompts(config.prompts)
    if config.model is not None:
        prompts, notes = fitting_prompts(prompts, config.model, config.render, config.prompts.on_bad)
        tell(notes)
    with output_directory(out, overwrite=how.overwrite, resume=True) as working:
        with (
            _writer(config, how.on) as writer,
            Journal(working / JOURNAL_FILE, _job(config, writer, prompts)) as journal,
        ):
            _fill(writer, prompts, journal)
        counts = _write(config, writer, prompts, journal.records, working)
        counts = {"prompts": len(prompts), "duplicate_prompts": num_duplicates, **counts}
        inputs = {"model": writer.identity}
        write_manifest(working, stage="traces generate", config=config, inputs=inputs, metrics=counts, counts=counts)
    # Only now: an interruption up to here finds all of its work again.
    (out / JOURNAL_FILE).unlink()
    return Checkpoint(out)


def read_prompts(config: TraceConfig) -> tuple[list[Trace], int]:
    """The distinct prompts of a source, and how many were repeated; records need no thought here."""
    traces, read = read_problems(config)
    unique, counts = deduplicate(traces)
    tell([*read.lines(), *counts.lines()])
    return unique, len(traces) - len(unique)


def to_thought(record: dict[str, Any], markers: Markers) -> Thought:
    """Thought and answer of one record; an output that the length limit cut has a problem.

    Raises: TraceFormatError for what cannot be used at all.
    """
    text, reasoning = record["text"], record["reasoning"]
    if reasoning is None:
        thought = split_thought(text, markers)
    elif text.strip():
        thought = join_thought(reasoning, text, markers)
    else:
        thought = unclosed_thought(reasoning, "missing end marker: the server sent reasoning and no answer")
    if record["stopped"] or thought.problem is not None:
        return thought
    return thought._replace(problem="cut: the length limit ended the answer")


@contextmanager
def _writer(config: GenerateConfig, on: Place) -> Iterator[Writer]:
    if config.model is not None:
        yield LocalWriter(config.model, config.sampling, config.render, config.group_prompts, on)
        return
    assert config.server is not None
    client = Client(config.server, config.client, api_key(config.client))
    try:
        yield ServedWriter(client, config.server_model or client.only_model(), config.sampling)
    finally:
        client.close()


def _fill(writer: Writer, prompts: list[Trace], journal: Journal) -> None:
    """Have every sample in the journal."""
    start, tokens = time.monotonic(), 0
    with bar("generating", len(prompts) * writer.sampling.num_samples) as progress:
        progress.advance(len(journal.records))
        for records in writer.write(prompts, journal.records):
            new = sum(key not in journal for key in records)
            journal.add(records)
            tokens += sum(record["tokens"] for record in records.values())
            speed = tokens / max(1e-9, time.monotonic() - start)
            progress.advance(new, f"{tokens:,} tokens, {speed:,.0f} tokens/s")


def _write(
    config: GenerateConfig, writer: Writer, prompts: list[Trace], records: Records, working: Path
) -> dict[str, Any]:
    markers = Markers(config.render.start_marker, config.render.end_marker)
    traces: list[Trace] = []
    skipped: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    for prompt in prompts:
        for sample in range(config.sampling.num_samples):
            record = records[prompt.prompt_key, sample]
            trace, problem = _trace(writer, prompt, sample, record, markers)
            if problem is not None:
                reasons[problem.partition(":")[0]] += 1
            if trace is not None and (problem is None or config.on_bad == "keep"):
                traces.append(trace)
            else:
                skipped.append({"prompt": prompt.prompt_key, "sample": sample, "problem": problem, **record})
    write_json(working / SKIPPED_FILE, skipped)
    if not traces:
        raise LimbeckError(
            f"none of {len(skipped)} outputs is a whole trace ({dict(reasons)}); raise sampling.max_new_tokens, set "
            "on_bad to keep, or use a model that thinks. What was generated is kept."
        )
    write_jsonl(traces, working / TRACES_FILE)
    return {
        "samples": len(records),
        "kept": len(traces),
        "skipped": len(skipped),
        "problems": dict(sorted(reasons.items())),
        "prompt_tokens": sum(record["prompt_tokens"] for record in records.values()),
        "generated_tokens": sum(record["tokens"] for record in records.values()),
    }


def _trace(
    writer: Writer, prompt: Trace, sample: int, record: dict[str, Any], markers: Markers
) -> tuple[Trace | None, str | None]:
    try:
        thought = to_thought(record, markers)
    except TraceFormatError as error:
        return None, str(error)
    made = {
        "writer": writer.model,
        "sample": sample,
        "output_tokens": record["tokens"],
    }
    trace = replace(
        prompt,
        cot=thought.cot,
        answer=thought.answer,
        cot_closed=thought.cot_closed,
        correct=None,
        source=f"{prompt.source}, sample {sample}",
        metadata={**prompt.metadata, **made},
    )
    return trace, thought.problem


def _job(config: GenerateConfig, writer: Writer, prompts: list[Trace]) -> str:
    """What must be equal for the work of an interrupted run to be used: all but how the server is asked."""
    tree = {key: value for key, value in to_dict(config).items() if key not in ("client", "server", "on_bad")}
    return config_hash({**tree, "writer": writer.identity, "prompt_keys": [prompt.prompt_key for prompt in prompts]})
