"""The stage `evaluate`: a model and problems or a text in, rows and a summary with intervals out."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any

from limbeck.checkpoint import Checkpoint, output_directory, write_json, write_manifest
from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.evaluate.perplexity import PerplexityConfig, token_windows, window_sums
from limbeck.evaluate.run import EvaluateConfig, evaluate
from limbeck.evaluate.tasks import task_from_traces
from limbeck.models.load import load_model, load_tokenizer, model_hash
from limbeck.progress import bar
from limbeck.stage import How
from limbeck.traces.counts import tell
from limbeck.traces.record import REFERENCE_COLUMNS
from limbeck.traces.render import RenderConfig, render_prompt, stop_ids
from limbeck.traces.rendering import fitting_prompts
from limbeck.traces.select import SelectConfig, select_traces
from limbeck.traces.sources import TraceConfig, read_problems
from limbeck.traces.trace import Trace


@checked
class EvaluateStageConfig:
    """Which model, on which problems."""

    model: str
    """Directory, alias (tiny-teacher, tiny-student, smollm2-135m) or hub id."""
    problems: TraceConfig | None = None
    """Traces whose prompts are the problems and whose references are the right answers."""
    perplexity: PerplexityConfig | None = None
    """Perplexity on a text, beside the problems or alone."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Sampling and checking."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How prompts become tokens."""

    def __post_init__(self) -> None:
        if self.problems is None and self.perplexity is None:
            raise ConfigError("evaluate: set problems.source, or perplexity.text (`prose` or a file), or both")


def run(config: EvaluateStageConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `results.jsonl`, `summary.json` and a manifest into `out`."""
    name = config.model
    with output_directory(out, overwrite=how.overwrite) as working:
        summary: dict[str, Any] = {"model": Path(name).name}
        if config.problems is not None:
            summary = score(name, config, working)
        if config.perplexity is not None:
            summary |= measure_perplexity(name, config.perplexity, config.render)
            write_json(working / "summary.json", summary)
        write_manifest(
            working,
            stage="evaluate",
            config=config,
            inputs={"model": model_hash(name)},
            metrics=summary,
        )
    return Checkpoint(out)


def score(name: str, config: EvaluateStageConfig, directory: Path) -> dict[str, Any]:
    """Generate, check and write the rows and the summary of one model into an existing directory."""
    assert config.problems is not None
    traces = problems_of(name, config.problems, config.render)
    task = task_from_traces(config.problems.source, traces)
    tokenizer = load_tokenizer(name)
    with bar(f"evaluating {Path(name).name}", len(traces) * config.evaluate.num_samples) as progress:
        result = evaluate(
            load_model(name),
            tokenizer,
            task,
            config.evaluate,
            render_prompt=lambda messages: render_prompt(tokenizer, messages, config.render),
            stop_ids=stop_ids(tokenizer, config.render),
            start_marker=config.render.start_marker,
            end_marker=config.render.end_marker,
            advance=progress.advance,
        )
    result.write(directory)
    summary = {"model": Path(name).name, "num_problems": len(traces), **result.summary}
    write_json(directory / "summary.json", summary)
    return summary


def problems_of(model: str, source: TraceConfig, rendering: RenderConfig) -> list[Trace]:
    """The distinct problems of a source that a model has room for; what is left out is said.

    Raises: ConfigError when one has no reference answer, or leaves no room for an answer.
    """
    traces, read = read_problems(source)
    traces, selected = select_traces(traces, SelectConfig())
    without = [trace for trace in traces if trace.reference is None]
    if without:
        raise ConfigError(
            f"{source.source}: {len(without)} of {len(traces)} problems have no reference answer to check against, the "
            f"first is {without[0].source}; a reference is read from {', '.join(REFERENCE_COLUMNS)}."
        )
    traces, notes = fitting_prompts(traces, model, rendering, source.on_bad)
    tell([*read.lines(), *selected.lines(), *notes])
    return traces


def measure_perplexity(name: str, config: PerplexityConfig, rendering: RenderConfig) -> dict[str, Any]:
    """Perplexity of one model, and its divergence from the reference where there is one."""
    windows = token_windows(config, load_tokenizer(name), rendering)
    reference = load_model(config.reference) if config.reference is not None else None
    with bar(f"perplexity of {Path(name).name}", len(windows)) as progress:
        sums = window_sums(load_model(name), windows, reference, progress.advance)
    return sums.summary(config.seed)
