"""Run a sweep: one teacher pass, then every run in a process of its own, then one summary. Resumable run by run.

1. Plan the runs and their controls; render and cut their traces; refuse problems that are also training prompts, and
   runs that would train on nothing.
2. The teacher reads every distinct sequence once, into a cache of the positions that any run asks for; sequences that
   are cut at their end share rows with the uncut ones, so the lead fractions cost nothing more.
3. Each run trains and is scored in a fresh process, so that its peak memory is its own: one by one here, side by side
   on Ray. A run whose manifest has the same config is not run again. One that fails is a row with its reason.
4. Scores are set against the uncut run and the base student problem by problem.

    OUT/teacher_cache/   OUT/tuning/NAME/   OUT/runs/NAME/   OUT/runs/NAME/evaluation/   OUT/teacher/   OUT/base/
    OUT/summary.json
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from limbeck.checkpoint import Checkpoint, write_json, write_manifest
from limbeck.distill import train
from limbeck.distill.commands import DISTILL
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import UNCUT, prepare
from limbeck.distill.setup import epoch_tokens
from limbeck.errors import ConfigError, LimbeckError
from limbeck.evaluate.commands import EVALUATE
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.models.load import load_tokenizer
from limbeck.progress import console
from limbeck.runner.place import map_in_processes
from limbeck.runner.process import in_process
from limbeck.stage import How, Place, go_on
from limbeck.sweep.controls import with_controls
from limbeck.sweep.plan import PlannedRun, SweepConfig, base_directory, naming, plan_runs, tokenizer_name
from limbeck.sweep.summary import summarise
from limbeck.sweep.tuning import tuned
from limbeck.teacher.build import write_cache
from limbeck.teacher.cache import CacheConfig
from limbeck.teacher.shard import Stored
from limbeck.traces.batch import Example
from limbeck.traces.sources import read_problems, read_traces

CACHE, SUMMARY = "teacher_cache", "summary.json"
Call = tuple[DistillConfig, EvaluateStageConfig, Path]
"""What a run is made from: its config, how it is scored, its directory."""


def run(config: SweepConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Do what is not done yet of a sweep in the directory `out`; called again, it goes on.

    Writes `summary.json`, a directory a run, and a manifest whose metrics are the summary's best run.
    """
    sweep, on = config, how.on
    _refuse_leaks(sweep)
    runs = all_runs(sweep)
    if not has_cache(sweep):
        _refuse_empty(runs)
    store = _store(sweep, runs, out, on) if has_cache(sweep) else None
    models = _score_models(sweep, runs, out, on)
    if sweep.tune:
        runs = tuned([with_cache(sweep, planned, out) for planned in runs], sweep.tune, out, on)
    failed = dict(_failures(sweep, runs, out, on))
    if len(failed) == len(runs):
        raise LimbeckError(f"all {len(runs)} runs failed; the first, {runs[0].name}: {failed[runs[0].name]}")
    summary = summarise(sweep, runs, models, store, out, failed)
    write_json(out / SUMMARY, summary)
    rows = [row for row in summary["runs"] if "failed" not in row]
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


def all_runs(sweep: SweepConfig) -> list[PlannedRun]:
    """What a sweep trains: the runs of its axes, at equal tokens where that is asked for, and their controls."""
    runs = match_tokens(sweep, plan_runs(sweep))
    return with_controls(runs) if sweep.controls else runs


def _failures(sweep: SweepConfig, runs: Sequence[PlannedRun], out: Path, on: Place) -> Iterator[tuple[str, str]]:
    """Name and reason of every run that failed; the others go on."""
    for (_, _, directory), reason in _attempts(_announced(sweep, runs, out), on):
        if reason is not None:
            console.print(f"failed: {directory.name}: {reason}", highlight=False)
            yield directory.name, reason
        elif on == "ray":
            console.print(f"done: {directory.name}", highlight=False)


def _attempts(calls: Iterable[Call], on: Place) -> Iterator[tuple[Sequence[Any], str | None]]:
    """Every call with the reason for which it failed, or None."""
    if on == "ray":
        yield from map_in_processes(_attempt, calls, on)
        return
    for call in calls:
        try:
            yield call, in_process(_attempt, *call)
        except LimbeckError as error:  # the process itself died
            yield call, str(error)


def _attempt(config: DistillConfig, scoring: EvaluateStageConfig, directory: Path) -> str | None:
    """Train and score one run; why that failed, or None."""
    try:
        _run_one(config, scoring, directory)
    except LimbeckError as error:
        return str(error)
    except Exception as error:
        console.print(traceback.format_exc(), markup=False, highlight=False)
        return f"{type(error).__name__}: {error}"
    return None


def _announced(sweep: SweepConfig, runs: Sequence[PlannedRun], out: Path) -> Iterator[Call]:
    for number, planned in enumerate(runs, start=1):
        console.print(f"run {number} of {len(runs)}: {planned.name}", highlight=False)
        yield with_cache(sweep, planned, out).config, scoring_of(sweep, planned.config), out / "runs" / planned.name


def _refuse_leaks(sweep: SweepConfig) -> None:
    problems, _ = read_problems(sweep.problems)
    training = {trace.prompt_key for source in sweep.distill.all_sources for trace in read_traces(source.traces)[0]}
    shared = {trace.prompt_key for trace in problems} & training
    if shared:
        raise ConfigError(
            f"problems: {len(shared)} of {len(problems)} are also training prompts, so the score is not held out; "
            "use another seed, split or source."
        )


def _refuse_empty(runs: Sequence[PlannedRun]) -> None:
    """Refuse runs that would train on nothing before any of them trains.

    Raises: ConfigError that names the run.
    """
    for planned in runs:
        with naming(planned):
            prepare(planned.config, load_tokenizer(tokenizer_name(planned.config)))


def match_tokens(sweep: SweepConfig, runs: list[PlannedRun]) -> list[PlannedRun]:
    """With equal tokens, every run gets the tokens that the uncut traces hold over its epochs."""
    if sweep.match == "examples":
        return runs
    matched = []
    for planned in runs:
        tokenizer = load_tokenizer(tokenizer_name(planned.config))
        uncut = dataclasses.replace(planned.config, truncation=UNCUT)
        tokens = round(epoch_tokens(uncut, prepare(uncut, tokenizer)) * planned.config.training.epochs)
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
    return write_cache(name, CacheConfig(top_k=sweep.top_k), asked, out / CACHE, sweep, on)


def asked_of_teacher(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> list[Stored]:
    """The sequences and positions of all runs that the teacher is asked about."""
    tokenizer = load_tokenizer(tokenizer_name(sweep.distill))
    return [
        Stored(example.sample.input_ids, example.kd_weight > 0)
        for planned in runs
        for example in _taught(planned, tokenizer)
    ]


def _taught(planned: PlannedRun, tokenizer: Any) -> list[Example]:
    """What the teacher is asked about; the held-out sequences too where the run is validated against it.

    Raises: ConfigError, naming the run, when no supervised token is left in it.
    """
    with naming(planned):
        data = prepare(planned.config, tokenizer)
    asked = data.train + (data.validation if planned.config.training.keep_best == "kd" else [])
    numbers = planned.config.teacher_numbers
    return [example for example in asked if not numbers[example.sample.origin]]


def _score_models(sweep: SweepConfig, runs: Sequence[PlannedRun], out: Path, on: Place) -> dict[Path, dict[str, Any]]:
    """The metrics of the teacher and of every base student before any training, by directory."""
    teacher = sweep.distill.teacher.model if sweep.evaluate_teacher else None
    places = {base_directory(sweep, planned, out): tokenizer_name(planned.config) for planned in runs}
    places = {out / "base": tokenizer_name(sweep.distill), **places} | ({out / "teacher": teacher} if teacher else {})
    stage = scoring_of(sweep, sweep.distill)
    calls = [(dataclasses.replace(stage, model=name), place) for place, name in places.items()]
    return {
        place: {"name": scoring.model} | found for (scoring, place), found in map_in_processes(_score_one, calls, on)
    }


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
