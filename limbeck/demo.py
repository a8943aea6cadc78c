"""The main job on the embedded default, offline: the built-in teacher writes traces, small students learn from parts of
them, the best one is then made smaller still, and one page shows what each step saves and costs.

1. The teacher answers problems of builtin:recheck, sampled; what it gets wrong is left out.
2. A sweep distils two base students on the first part of the traces: a capable one, which knows how such texts run and
   is often wrong, and a novice. Cuts are one length for all traces or a share of each; beside every cut stand whole
   traces at its cost.
3. Every student is scored on other problems, and so are the base students.
4. The best student loses half of its parameters, learns again from the same traces, and is quantised to 4 bits; what
   each step left is scored on the same problems. The report is written beside `summary.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from limbeck.checkpoint import MANIFEST, Checkpoint, output_directory, write_json, write_manifest
from limbeck.compress.commands import QUANTIZE, RECOVER
from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.compress.recover import RecoverConfig
from limbeck.config import build, checked, config_hash
from limbeck.distill.config import DistillConfig, StudentConfig
from limbeck.engine.complete import complete
from limbeck.engine.sampling import SeededSampling
from limbeck.errors import ConfigError, LimbeckError
from limbeck.evaluate.answers import Verdict, extract_answer
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
from limbeck.report.cuts import cut_sentences, recommended
from limbeck.report.tables import console_table, for_console
from limbeck.runner.process import in_process
from limbeck.stage import How, Stage, go_on
from limbeck.sweep import execute
from limbeck.sweep.plan import SweepConfig
from limbeck.traces.recheck import RecheckConfig, generate_rechecked
from limbeck.traces.render import RenderConfig, render_prompt, stop_ids
from limbeck.traces.sources import TraceConfig
from limbeck.traces.synthetic import DERIVATION_PATTERN
from limbeck.traces.thought import Markers, split_thought
from limbeck.traces.trace import Trace, write_jsonl

TEACHER = "tiny-recheck-teacher"
REGIMES = {"tiny-recheck-student": "capable", "tiny-student": "novice"}
"""Where each base student starts."""
CUTS = {
    "capable": [("common_length", 0.25), ("common_length", 0.5), ("lead", 0.5), ("lead", 1.0)],
    "novice": [("common_length", 0.5), ("lead", 1.0)],
}
"""Policies and lead fractions."""
SHOWN = "model-tiny-recheck-student_policy-common_length_lead_fraction-0.5"
"""The run that the page speaks of first."""
MAX_NEW_TOKENS = 900


@checked
class DemoConfig:
    """Size of the demonstration."""

    num_traces: int = 1000
    """Problems that the teacher is asked; wrong answers are left out."""
    num_problems: int = 200
    """Held-out problems for the score."""
    min_steps: int = 4
    """Fewest steps of a problem."""
    max_steps: int = 5
    """Most steps of a problem."""
    temperature: float = 1.0
    """Sampling temperature of the teacher's traces; 1 leaves their lengths as it learnt them."""
    epochs: float = 1.0
    """Passes over the traces."""
    learning_rate: float = 3e-4
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
    summary = with_regimes(out / execute.SUMMARY)
    console.print(console_table(summary["runs"], summary["axes"]))
    finished = [run for run in summary["runs"] if "failed" not in run]
    sentences = cut_sentences(finished, next(run for run in finished if run["name"] == SHOWN))
    console.print("\n".join(sentences), highlight=False)
    best = max((run for run in finished if not run["control"]), key=lambda run: run["accuracy"])
    made = compress(sweep, out / "runs" / best["name"], out)
    console.print(for_console(compression_table(collect(made).compressed, is_brief=True)))
    report = page.write_report([out, *made], out, top=sentences)
    console.print(f"report: {report}\nnumbers: {out / 'summary.json'}", highlight=False)
    return Checkpoint(out)


def with_regimes(file: Path) -> dict[str, Any]:
    """The sweep's summary with the regime of every run, written back, and the name of the recommended run."""
    summary = json.loads(file.read_text(encoding="utf-8"))
    for run in summary["runs"]:
        run["regime"] = REGIMES[run["student"]]
    summary["recommended"] = recommended([run for run in summary["runs"] if "failed" not in run])["name"]
    write_json(file, summary)
    return summary


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
            "student": {"model": next(iter(REGIMES))},
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
        source="builtin:recheck",
        num_traces=config.num_problems,
        seed=config.seed + 1_000_001,
        recheck=RecheckConfig(fewest_steps=config.min_steps, most_steps=config.max_steps),
    )
    runs: list[Mapping[str, Any]] = [
        {"student.model": student, "truncation.policy": policy, "lead_fraction": fraction}
        for student, regime in REGIMES.items()
        for policy, fraction in CUTS[regime]
    ]
    return SweepConfig(
        title="What a truncated trace is worth: built-in teacher to two built-in students",
        distill=distill,
        problems=problems,
        runs=runs,
        controls=True,
        evaluate=EvaluateConfig(max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, top_p=0.95, batch_size=300),
    )


def sample_traces(config: DemoConfig, out: Path) -> Path:
    """Traces of the demonstration that its teacher wrote and whose answers are right; returns their file."""
    sampling = SeededSampling(
        max_new_tokens=MAX_NEW_TOKENS, temperature=config.temperature, top_p=0.95, seed=config.seed
    )
    return write_answers(_training_problems(config), TEACHER, sampling, config, out)


def write_answers(problems: list[Trace], teacher: str, sampling: SeededSampling, config: Any, out: Path) -> Path:
    """What a teacher answers right, as a file of traces; `config` says in the manifest what it was made from."""
    file = out / "traces.jsonl"
    if (out / MANIFEST).exists() and Checkpoint(out).manifest["config_hash"] == config_hash(config):
        return file
    answered = answer(problems, teacher, sampling)
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
        write_manifest(working, stage="demo traces", config=config, inputs={"teacher": teacher}, counts=counts)
    return file


def _training_problems(config: DemoConfig) -> list[Trace]:
    """Problems that no held-out one is."""
    steps = RecheckConfig(fewest_steps=config.min_steps, most_steps=config.max_steps)
    taken = {problem.prompt_key for problem in generate_rechecked(config.num_problems, config.seed + 1_000_001, steps)}
    problems = generate_rechecked(config.num_traces, config.seed, steps)
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
    verdict = check_exact(extract_answer(thought.answer, "auto", problem.reference), problem.reference)
    return replace(
        problem,
        cot=thought.cot,
        answer=thought.answer,
        correct=verdict is Verdict.RIGHT,
        metadata={**problem.metadata, "model": model_name},
    )


DEMO = Stage(name="demo", config=DemoConfig, run=run, takes=())

make_callable(__name__)
