"""The stage `evaluate`: a model and problems or a text in, rows and a summary with intervals out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from limbeck.checkpoint import Checkpoint, output_directory, write_json, write_manifest
from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.evaluate.answers import Verdict, answer_part
from limbeck.evaluate.benchmark_data import BenchmarkConfig, benchmark_task
from limbeck.evaluate.benchmarks import BENCHMARKS
from limbeck.evaluate.metrics import share_interval
from limbeck.evaluate.perplexity import PerplexityConfig, token_windows, window_sums
from limbeck.evaluate.run import EvaluateConfig, EvaluationResult, ProblemResult, evaluate, summarise
from limbeck.evaluate.seen import count_seen
from limbeck.evaluate.tasks import Task, task_from_traces
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
    benchmark: BenchmarkConfig | None = None
    """A public benchmark by name, instead of problems."""
    perplexity: PerplexityConfig | None = None
    """Perplexity on a text, beside the problems or alone."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Sampling and checking."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How prompts become tokens."""

    def __post_init__(self) -> None:
        if self.problems is None and self.benchmark is None and self.perplexity is None:
            raise ConfigError(
                "evaluate: set problems.source, benchmark.name and benchmark.data, or perplexity.text (prose or a file)"
            )
        if self.problems is not None and self.benchmark is not None:
            raise ConfigError("evaluate: problems and benchmark are both set; score them one after the other")


def run(config: EvaluateStageConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write `results.jsonl`, `summary.json` and a manifest into `out`."""
    name = config.model
    with output_directory(out, overwrite=how.overwrite) as working:
        summary: dict[str, Any] = {"model": Path(name).name}
        if config.problems is not None or config.benchmark is not None:
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
    task = task_of(name, config)
    tokenizer = load_tokenizer(name)
    with bar(f"evaluating {Path(name).name}", len(task.problems) * config.evaluate.num_samples) as progress:
        result = evaluate(
            load_model(name),
            tokenizer,
            task,
            config.evaluate,
            render_prompt=lambda messages: render_prompt(tokenizer, messages, config.render),
            stop_ids=stop_ids(tokenizer, config.render),
            start_marker=config.render.start_marker,
            end_marker=config.render.end_marker,
            derivation_pattern=config.render.derivation_pattern if config.render.knows_derivations else None,
            advance=progress.advance,
        )
    result, measured = with_benchmark(config, task, result)
    result.write(directory)
    summary = {"model": Path(name).name, "num_problems": len(task.problems), **result.summary, **measured}
    if (seen := count_seen(name, task.problems)) is not None:
        summary["problems_trained_on"] = seen
    write_json(directory / "summary.json", summary)
    return summary


def task_of(name: str, config: EvaluateStageConfig) -> Task:
    """What a model is to be scored on."""
    if config.benchmark is not None:
        return benchmark_task(config.benchmark)
    assert config.problems is not None
    return task_from_traces(config.problems.source, problems_of(name, config.problems, config.render))


def with_benchmark(
    config: EvaluateStageConfig, task: Task, result: EvaluationResult
) -> tuple[EvaluationResult, dict[str, float]]:
    """The result, and the benchmark's own metrics with intervals. A metric is the verdict where nothing else is."""
    measure = None if config.benchmark is None else BENCHMARKS[config.benchmark.name].measure
    if measure is None:
        return result, {}
    markers = (config.render.start_marker, config.render.end_marker)
    found = [
        [measure(problem.metadata, answer) for answer in _answers(row, *markers)]
        for problem, row in zip(task.problems, result.rows, strict=True)
    ]
    if all(problem.reference is None for problem in task.problems):
        first = next(iter(found[0][0]))
        result = _judged(result, [[bool(sample[first]) for sample in samples] for samples in found], config.evaluate)
    return result, _intervals(found, config.evaluate.seed)


def _intervals(found: Sequence[Sequence[Mapping[str, float]]], seed: int) -> dict[str, float]:
    """The mean of every metric over problems, and the ends of its interval."""
    measured: dict[str, float] = {}
    for metric in found[0][0]:
        interval = share_interval([[sample[metric] for sample in samples] for samples in found], seed)
        measured |= {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
    return measured


def _answers(row: ProblemResult, start_marker: str, end_marker: str) -> list[str]:
    """What follows the thought in every output; "" where nothing does."""
    is_open = row.prompt.rstrip().endswith(start_marker)
    return [answer_part(output, start_marker, end_marker, is_open) or "" for output in row.outputs]


def _judged(result: EvaluationResult, is_right: Sequence[Sequence[bool]], config: EvaluateConfig) -> EvaluationResult:
    """The result with other verdicts, a list a problem."""
    names = (Verdict.WRONG.value, Verdict.RIGHT.value)
    rows = [
        replace(row, verdicts=[names[right] for right in samples])
        for row, samples in zip(result.rows, is_right, strict=True)
    ]
    seconds = {name: value for name, value in result.summary.items() if name.endswith("seconds")}
    return EvaluationResult(rows, summarise(rows, config) | seconds)


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
