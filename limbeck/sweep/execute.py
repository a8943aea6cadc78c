"""Run a sweep: one teacher pass, then every run in a process of its own, then one summary. Resumable run by run.

1. Plan the runs; render and cut their traces; refuse problems that are also training prompts.
2. The teacher reads every distinct sequence once, into a cache of the positions that any run asks for; sequences that
   are cut at their end share rows with the uncut ones, so the lead fractions cost nothing more.
3. Each run trains and is scored in a fresh process, so that its peak memory is its own: one by one here, side by side
   on Ray. A run whose manifest has the same config is not run again.
4. Scores are set against the uncut run problem by problem.

    OUT/teacher_cache/   OUT/runs/NAME/   OUT/runs/NAME/evaluation/   OUT/teacher/   OUT/base/   OUT/summary.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from limbeck.checkpoint import Checkpoint, write_json, write_manifest
from limbeck.distill import train
from limbeck.distill.commands import DISTILL
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import UNCUT, prepare
from limbeck.errors import ConfigError
from limbeck.evaluate.commands import EVALUATE
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.models.load import load_tokenizer
from limbeck.progress import console
from limbeck.runner.place import map_in_processes
from limbeck.runner.process import in_process
from limbeck.stage import How, Place, go_on
from limbeck.sweep.plan import PlannedRun, SweepConfig, plan_runs, tokenizer_name
from limbeck.sweep.summary import summarise
from limbeck.teacher.build import write_cache
from limbeck.teacher.cache import CacheConfig
from limbeck.teacher.shard import Stored
from limbeck.traces.batch import Example
from limbeck.traces.sources import read_problems, read_traces

CACHE, SUMMARY = "teacher_cache", "summary.json"


def run(config: SweepConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Do what is not done yet of a sweep in the directory `out`; called again, it goes on.

    Writes `summary.json`, a directory a run, and a manifest whose metrics are the summary's best run.
    """
    sweep, on = config, how.on
    runs = plan_runs(sweep)
    _refuse_leaks(sweep)
    runs = match_tokens(sweep, runs)
    store = _store(sweep, runs, out, on) if has_cache(sweep) else None
    models = _score_models(sweep, out, on)
    for (_, _, directory), _ in map_in_processes(_run_one, _announced(sweep, runs, out), on):
        if on == "ray":
            console.print(f"done: {directory.name}", highlight=False)
    summary = summarise(sweep, runs, models, store, out)
    write_json(out / SUMMARY, summary)
    rows = summary["runs"]
    best = max(rows, key=lambda row: row["accuracy"])
    write_manifest(
        out,
        stage="sweep",
        config=sweep,
        inputs=train.inputs_of(sweep.distill),
        ledger={"tokens": sum(r["tokens"] for r in rows), "flops": {"total": sum(r["flops"] for r in rows)}},
        metrics={
            "runs": len(rows),
            "best": best["name"],
            "best_accuracy": best["accuracy"],
            "peak_bytes": max(row["peak_bytes"] for row in rows),
        },
    )
    return Checkpoint(out)


def _announced(
    sweep: SweepConfig, runs: Sequence[PlannedRun], out: Path
) -> Iterator[tuple[DistillConfig, EvaluateStageConfig, Path]]:
    for number, planned in enumerate(runs, start=1):
        console.print(f"run {number} of {len(runs)}: {planned.name}", highlight=False)
        yield with_cache(sweep, planned, out).config, scoring_of(sweep, planned.config), out / "runs" / planned.name


def _refuse_leaks(sweep: SweepConfig) -> None:
    problems, _ = read_problems(sweep.problems)
    training, _ = read_traces(sweep.distill.traces)
    shared = {trace.prompt_key for trace in problems} & {trace.prompt_key for trace in training}
    if shared:
        raise ConfigError(
            f"problems: {len(shared)} of {len(problems)} are also training prompts, so the score is not held out; "
            "use another seed, split or source."
        )


def match_tokens(sweep: SweepConfig, runs: list[PlannedRun]) -> list[PlannedRun]:
    """With equal tokens, every run gets the tokens that the uncut traces hold over its epochs."""
    if sweep.match == "examples":
        return runs
    matched = []
    for planned in runs:
        tokenizer = load_tokenizer(tokenizer_name(planned.config))
        uncut = dataclasses.replace(planned.config, truncation=UNCUT)
        tokens = round(prepare(uncut, tokenizer).counts["tokens_before_cut"] * planned.config.training.epochs)
        training = dataclasses.replace(planned.config.training, max_tokens=tokens)
        matched.append(planned._replace(config=dataclasses.replace(planned.config, training=training)))
    return matched


def has_cache(sweep: SweepConfig) -> bool:
    """Whether one pass of the teacher serves all runs."""
    return sweep.top_k > 0 and sweep.distill.teacher.model is not None


def with_cache(sweep: SweepConfig, planned: PlannedRun, out: Path) -> PlannedRun:
    """The run with the sweep's cache as its teacher, where there is one."""
    if not has_cache(sweep) or planned.config.teacher.model is None:
        return planned
    # Weight and further teachers stay.
    teacher = dataclasses.replace(planned.config.teacher, model=None, cache=out / CACHE)
    return planned._replace(config=dataclasses.replace(planned.config, teacher=teacher))


def _store(sweep: SweepConfig, runs: Sequence[PlannedRun], out: Path, on: Place) -> dict[str, Any]:
    # On Ray the teacher is loaded by the tasks; here in a process whose memory goes back when it is done.
    return _fill_cache(sweep, runs, out, on) if on == "ray" else in_process(_fill_cache, sweep, runs, out, on)


def _fill_cache(sweep: SweepConfig, runs: Sequence[PlannedRun], out: Path, on: Place) -> dict[str, Any]:
    """Store what the teacher says at every position that a run asks for; what is there already is kept."""
    name = sweep.distill.teacher.model
    assert name is not None
    asked = asked_of_teacher(sweep, runs)
    return write_cache(name, CacheConfig(top_k=sweep.top_k), asked, out / CACHE, sweep)


def asked_of_teacher(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> list[Stored]:
    """The sequences and positions of all runs that the teacher is asked about."""
    tokenizer = load_tokenizer(tokenizer_name(sweep.distill))
    return [
        Stored(example.sample.input_ids, example.kd_weight > 0)
        for planned in runs
        for example in _taught(planned.config, tokenizer)
    ]


def _taught(config: DistillConfig, tokenizer: Any) -> list[Example]:
    """What the teacher is asked about; the held-out sequences too where the run is validated against it."""
    data = prepare(config, tokenizer)
    return data.train + (data.validation if config.training.keep_best == "kd" else [])


def _score_models(sweep: SweepConfig, out: Path, on: Place) -> dict[str, Any]:
    """Teacher and base student before any training, each scored once."""
    names = {"base": sweep.distill.student.model}
    if sweep.evaluate_teacher:
        names["teacher"] = sweep.distill.teacher.model
    stage = scoring_of(sweep, sweep.distill)
    calls = [(dataclasses.replace(stage, model=name), out / role) for role, name in names.items() if name is not None]
    metrics = {scoring[0].model: found for scoring, found in map_in_processes(_score_one, calls, on)}
    return {role: {"name": name} | metrics[name] for role, name in names.items() if name is not None}


def _run_one(config: DistillConfig, scoring: EvaluateStageConfig, directory: Path) -> None:
    """Train and score one run, or what is missing of it."""
    go_on(DISTILL, config, directory)
    _score_one(dataclasses.replace(scoring, model=str(directory)), directory / "evaluation")


def _score_one(scoring: EvaluateStageConfig, directory: Path) -> dict[str, Any]:
    """The metrics of one model, from before where they are there."""
    return go_on(EVALUATE, scoring, directory).metrics


def scoring_of(sweep: SweepConfig, config: DistillConfig) -> EvaluateStageConfig:
    """How the student of a run is scored; the model is filled in."""
    return EvaluateStageConfig(model="", problems=sweep.problems, evaluate=sweep.evaluate, render=config.render)
