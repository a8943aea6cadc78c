"""The main job on the embedded default, offline: the built-in teacher writes traces, a small student learns from parts
of them and is then made smaller still, and one page shows what each step saves and costs.

1. The teacher answers hard problems of the built-in task, sampled; what it gets wrong is left out.
2. A sweep distils the built-in base student on the first part of every trace, at several lead fractions, with and
   without the ending re-attached.
3. Every student is scored on other hard problems.
4. The best student loses half of its parameters, learns again from the same traces, and is quantised to 4 bits; what
   each step left is scored on the same problems. The report is written beside `summary.json`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from limbeck.checkpoint import MANIFEST, Checkpoint, output_directory, write_manifest
from limbeck.compress.commands import QUANTIZE, RECOVER
from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.compress.recover import RecoverConfig
from limbeck.config import build, checked, config_hash
from limbeck.distill.config import DistillConfig, StudentConfig
from limbeck.engine.complete import complete
from limbeck.engine.sampling import SeededSampling
from limbeck.errors import ConfigError, LimbeckError
from limbeck.evaluate.answers import Verdict
from limbeck.evaluate.commands import EVALUATE
from limbeck.evaluate.compare import check_exact
from limbeck.evaluate.run import EvaluateConfig
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.lazy import make_callable
from limbeck.models.load import load_model, load_tokenizer
from limbeck.progress import bar, console
from limbeck.report import page
from limbeck.report.collect import collect
from limbeck.report.compression import compression_table
from limbeck.report.tables import console_table, for_console
from limbeck.runner.process import in_process
from limbeck.stage import How, Stage, go_on
from limbeck.sweep import execute
from limbeck.sweep.plan import SweepConfig
from limbeck.traces.render import RenderConfig, render_prompt, stop_ids
from limbeck.traces.sources import TraceConfig
from limbeck.traces.synthetic import DERIVATION_PATTERN
from limbeck.traces.synthetic import generate as make_problems
from limbeck.traces.thought import Markers, split_thought
from limbeck.traces.trace import Trace, write_jsonl

TEACHER, STUDENT = "tiny-teacher", "tiny-student"


@checked
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


def run(config: DemoConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Do the demonstration in the directory `out`, going on where an earlier one stopped; prints tables and page."""
    traces = sample_traces(config, out / "traces")
    sweep = sweep_config(config, traces)
    execute.run(sweep, out)
    summary = json.loads((out / execute.SUMMARY).read_text(encoding="utf-8"))
    console.print(console_table(summary["runs"]))
    best = max(summary["runs"], key=lambda run: run["accuracy"])
    made = compress(sweep, out / "runs" / best["name"], out)
    console.print(for_console(compression_table(collect(made).compressed, is_brief=True)))
    report = page.write_report([out, *made], out)
    console.print(f"report: {report}\nnumbers: {out / 'summary.json'}", highlight=False)
    return Checkpoint(out)


def compress(sweep: SweepConfig, student: Path, out: Path) -> list[Path]:
    """Prune, recover and quantise a student of the sweep, and score what each step left; returns what was made."""
    recovered, quantised = out / "recovered", out / "quantised"
    distill = build(DistillConfig, Checkpoint(student).manifest["config"])
    again = replace(distill.training, epochs=distill.training.epochs / 2)
    recovery = RecoverConfig(
        # Two thirds of the weights are in the MLPs: half of all parameters go. Fewer heads cost this student more.
        prune=PruneConfig(model=str(student), neuron_sparsity=0.75),
        distill=replace(distill, student=StudentConfig(model=str(student)), training=again),
    )
    in_process(go_on, RECOVER, recovery, recovered)
    rounding = QuantizeConfig(model=str(recovered), scheme="w4a16", group_size=32)
    in_process(go_on, QUANTIZE, rounding, quantised)
    scoring = EvaluateStageConfig(model="", problems=sweep.problems, evaluate=sweep.evaluate, render=distill.render)
    for directory in (recovered / "round-1" / "pruned", recovered, quantised):
        in_process(go_on, EVALUATE, replace(scoring, model=str(directory)), directory / "evaluation")
    return [recovered, quantised]


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
    problems = _training_problems(config)
    answered = answer(
        problems, TEACHER, SeededSampling(max_new_tokens=320, temperature=config.temperature, seed=config.seed)
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


def _training_problems(config: DemoConfig) -> list[Trace]:
    """Problems that no held-out one is."""
    held_out = make_problems(config.num_problems, config.seed + 1_000_001, config.min_steps, config.max_steps)
    taken = {problem.prompt_key for problem in held_out}
    problems = make_problems(config.num_traces, config.seed, config.min_steps, config.max_steps)
    return [problem for problem in problems if problem.prompt_key not in taken]


def answer(problems: list[Trace], model_name: str, sampling: SeededSampling) -> list[Trace | None]:
    """One sampled trace a problem, checked against its reference; None where no thought and answer could be read."""
    tokenizer, render = load_tokenizer(model_name), RenderConfig()
    stops = stop_ids(tokenizer, render)
    prompts = [render_prompt(tokenizer, problem.messages, render) for problem in problems]
    with bar("teacher traces", len(prompts)) as progress:
        completions = complete(
            load_model(model_name), prompts, sampling, stops, sampling.seed, advance=progress.advance
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


DEMO = Stage(name="demo", config=DemoConfig, run=run, takes=())

make_callable(__name__)
