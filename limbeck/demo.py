"""The main job on the embedded default, offline: the built-in teacher writes traces, a small student learns from parts
of them, and one page shows what each cut saves and costs.

1. The teacher answers hard problems of the built-in task, sampled; what it gets wrong is left out.
2. A sweep distils the built-in base student on the first part of every trace, at several lead fractions, with and
   without the ending re-attached.
3. Every student is scored on other hard problems; the report is written beside `summary.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from limbeck.checkpoint import MANIFEST, Checkpoint, output_directory, write_manifest
from limbeck.config import build, config_hash
from limbeck.distill.config import DistillConfig
from limbeck.errors import ConfigError, LimbeckError
from limbeck.evaluate.answers import Verdict, check_exact
from limbeck.evaluate.run import EvaluateConfig
from limbeck.models.generate import SamplingConfig, generate
from limbeck.models.load import load_model, load_tokenizer
from limbeck.progress import bar, console
from limbeck.report import page
from limbeck.report.tables import console_table
from limbeck.sweep import execute
from limbeck.sweep.plan import SweepConfig
from limbeck.traces.render import RenderConfig, render_prompt, stop_ids
from limbeck.traces.sources import TraceConfig
from limbeck.traces.synthetic import DERIVATION_PATTERN
from limbeck.traces.synthetic import generate as make_problems
from limbeck.traces.thought import Markers, split_thought
from limbeck.traces.trace import Trace, write_jsonl

TEACHER, STUDENT = "tiny-teacher", "tiny-student"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Size of the demonstration."""

    num_traces: int = 2000
    """Problems that the teacher is asked; wrong answers are left out."""
    num_problems: int = 300
    """Held-out problems for the score."""
    min_steps: int = 4
    """Fewest steps of a problem; as many as the base student knows, but with multiplication."""
    max_steps: int = 6
    """Most steps of a problem."""
    temperature: float = 0.7
    """Sampling temperature of the teacher's traces."""
    epochs: float = 2.0
    """Passes over the traces."""
    learning_rate: float = 1.5e-3
    """Peak learning rate of the students."""
    seed: int = 0
    """Seed of problems, traces and training."""

    def __post_init__(self) -> None:
        if self.num_traces < 20 or self.num_problems < 10:
            raise ConfigError("the demo needs at least 20 traces and 10 problems")


def run(config: DemoConfig, out: Path) -> None:
    """Do the demonstration in the directory `out`, going on where an earlier one stopped; prints table and page."""
    traces = sample_traces(config, out / "traces")
    summary = execute.run(sweep_config(config, traces), out)
    report = page.run([out], out)
    console.print(console_table(summary["runs"]))
    console.print(f"report: {report}\nnumbers: {out / 'summary.json'}", highlight=False)


def sweep_config(config: DemoConfig, traces: Path) -> SweepConfig:
    """The demonstration as a sweep, as one would write it in a recipe."""
    distill = build(
        DistillConfig,
        {
            "student": {"model": STUDENT},
            "teacher": {"model": TEACHER},
            "traces": {"source": str(traces)},
            "num_validation": max(4, config.num_traces // 32),
            "render": {"derivation_pattern": DERIVATION_PATTERN},
            "training": {"epochs": config.epochs, "batch_size": 16, "seed": config.seed},
            "optimizer": {"learning_rate": config.learning_rate, "beta2": 0.98},
            "schedule": {"warmup_fraction": 0.05},
        },
    )
    problems = TraceConfig(
        source="builtin:chain",
        num_traces=config.num_problems,
        seed=config.seed + 1_000_001,
        chain_min_steps=config.min_steps,
        chain_max_steps=config.max_steps,
    )
    return SweepConfig(
        title="What a truncated trace is worth: built-in teacher to built-in student",
        distill=distill,
        problems=problems,
        grid={"lead_fraction": [0.25, 0.5, 0.75, 1.0]},
        runs=[{"lead_fraction": fraction, "keep_ending": True} for fraction in (0.25, 0.5, 0.75)],
        evaluate=EvaluateConfig(max_new_tokens=320, temperature=0.0, batch_size=300),
    )


def sample_traces(config: DemoConfig, out: Path) -> Path:
    """Traces that the teacher wrote and whose answers are right; returns their file."""
    file = out / "traces.jsonl"
    if (out / MANIFEST).exists() and Checkpoint(out).manifest["config_hash"] == config_hash(config):
        return file
    held_out = make_problems(config.num_problems, config.seed + 1_000_001, config.min_steps, config.max_steps)
    taken = {problem.prompt_key for problem in held_out}
    problems = make_problems(config.num_traces, config.seed, config.min_steps, config.max_steps)
    problems = [problem for problem in problems if problem.prompt_key not in taken]
    answered = answer(
        problems, TEACHER, SamplingConfig(max_new_tokens=320, temperature=config.temperature, seed=config.seed)
    )
    right = [trace for trace in answered if trace is not None and trace.correct]
    if not right:
        raise LimbeckError("demo: the teacher answered no problem; its files are damaged; install limbeck again.")
    with output_directory(out, overwrite=True) as working:
        write_jsonl(right, working / file.name)
        counts = {
            "asked": len(problems),
            "malformed": sum(trace is None for trace in answered),
            "wrong": sum(trace is not None and not trace.correct for trace in answered),
            "kept": len(right),
        }
        write_manifest(working, stage="demo traces", config=config, inputs={"teacher": TEACHER}, counts=counts)
    return file


def answer(problems: list[Trace], model_name: str, sampling: SamplingConfig) -> list[Trace | None]:
    """One sampled trace a problem, checked against its reference; None where no thought and answer could be read."""
    tokenizer, render = load_tokenizer(model_name), RenderConfig()
    stops = stop_ids(tokenizer, render)
    prompts = [render_prompt(tokenizer, problem.messages, render) for problem in problems]
    with bar("teacher traces", len(prompts)) as progress:
        completions = generate(
            load_model(model_name), prompts, sampling, stops, tokenizer.pad_token_id, advance=progress.advance
        )
    traces: list[Trace | None] = []
    for problem, (completion,) in zip(problems, completions, strict=True):
        text = tokenizer.decode(completion.text_ids)
        traces.append(_read(problem, text, model_name) if completion.stopped else None)
    return traces


def _read(problem: Trace, text: str, model_name: str) -> Trace | None:
    thought = split_thought(text, Markers("<think>", "</think>"))
    if thought.problem is not None or thought.answer is None:
        return None
    verdict = check_exact(thought.answer.strip(), problem.reference or "")
    return replace(
        problem,
        cot=thought.cot,
        answer=thought.answer,
        correct=verdict is Verdict.RIGHT,
        metadata={**problem.metadata, "model": model_name},
    )
