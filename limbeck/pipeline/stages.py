"""The list of stages that a recipe asks for, in the order in which they run, and the call of each."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck.checkpoint import MANIFEST, Checkpoint, output_directory, write_manifest
from limbeck.compress import commands as compress_commands
from limbeck.compress import recover
from limbeck.compress.recover import RecoverConfig
from limbeck.config import checked
from limbeck.distill import caching, train
from limbeck.distill.caching import CacheStageConfig
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import UNCUT
from limbeck.errors import PairError
from limbeck.evaluate import commands as evaluate_commands
from limbeck.pipeline import choose, ranking, smoke
from limbeck.pipeline.choose import read_choice, with_axes
from limbeck.pipeline.config import (
    CACHE,
    CHOOSE,
    DISTILL,
    EXPORT,
    QUANTIZE,
    RECOVER,
    SMOKE,
    SWEEP,
    TRACES,
    VERIFY,
    PipelineConfig,
)
from limbeck.pipeline.task import OUT, Task
from limbeck.stage import How
from limbeck.sweep import execute
from limbeck.sweep.plan import SweepConfig, plan_runs
from limbeck.traces import commands as trace_commands
from limbeck.traces.supervise import Preset
from limbeck.traces.truncate import TruncationConfig

EVALUATE = "evaluate"
_FROM_THE_FRONT = ("lead", "budget", "common_length", "random_horizon", "first_derivation", "probed")
"""Policies that keep the beginning of a trace, so that the uncut one holds all that a teacher says of the cut one."""


@checked
class CachePartsConfig:
    """All that the runs of a pipeline ask a teacher about."""

    parts: list[CacheStageConfig]
    """One for each kind of cut whose sequences begin no other part's."""


@checked
class ChosenStudentConfig:
    """One student, by a choice where there was a sweep."""

    distill: DistillConfig
    """The run."""
    choice: str | None = None
    """Directory of the choice whose axes replace fields of the run."""
    source: str | None = None
    """The sweep it was chosen from: where its run is the one asked for, it is taken over and not trained again."""


@checked
class SmallerConfig:
    """One recovery, by the choice that the student was trained by."""

    recover: RecoverConfig
    """The recovery."""
    choice: str | None = None
    """Directory of the choice."""


def stages_of(config: PipelineConfig) -> list[Task]:
    """All stages of a recipe but those that tell of it (see `telling.py`)."""
    if config.ranking is not None:
        return ranking.stages_of(config.ranking)
    return [*_text_stages(config), *_model_stages(config), *_handing_over(config)]


def _text_stages(config: PipelineConfig) -> Iterator[Task]:
    if config.generate is not None:
        yield Task(TRACES, config.generate, trace_commands.GENERATE, TRACES)
    if config.traces is not None:
        yield Task(TRACES, config.traces, trace_commands.IMPORT, TRACES)
    if config.verify is not None:
        yield Task(VERIFY, config.verify, evaluate_commands.VERIFY, VERIFY)
    if config.cache is not None:
        parts = CachePartsConfig(parts=cache_parts(config))
        yield Task(CACHE, parts, call_cache, CACHE, gives=("cache.json",), is_filled_in_place=True)


def _model_stages(config: PipelineConfig) -> Iterator[Task]:
    """Every model, and its score right after it."""
    yield from _first_scores(config)
    choice = None
    if config.sweep is not None:
        weights, rows = "runs/*/*.safetensors", "runs/*/evaluation/results.jsonl"
        given = (weights, rows)
        yield Task(SWEEP, config.sweep, call_sweep, SWEEP, given, is_filled_in_place=True, is_isolated=False)
        yield Task(CHOOSE, config.choose, choose.STAGE, CHOOSE, gives=(choose.CHOICE,))
        choice = OUT + CHOOSE
    if config.distill is not None:
        sweep = OUT + SWEEP if choice else None
        yield Task(
            DISTILL, ChosenStudentConfig(distill=config.distill, choice=choice, source=sweep), call_distill, DISTILL
        )
        yield from _score(config, DISTILL, OUT + DISTILL, f"{DISTILL}/evaluation")
    if config.recover is not None:
        yield Task(RECOVER, SmallerConfig(recover=config.recover, choice=choice), call_recover, RECOVER)
        yield from _score(config, RECOVER, OUT + RECOVER, f"{RECOVER}/evaluation")
    if config.quantize is not None:
        yield Task(QUANTIZE, config.quantize, compress_commands.QUANTIZE, QUANTIZE)
        yield from _score(config, QUANTIZE, OUT + QUANTIZE, f"{QUANTIZE}/evaluation")


def _first_scores(config: PipelineConfig) -> Iterator[Task]:
    """Of the teacher, and of the model that the pipeline starts from."""
    teacher = config.distill.teacher.model if config.distill is not None else None
    start = config.distill.student.model if config.distill is not None else _first_model(config)
    if config.evaluate_teacher and teacher is not None:
        yield from _score(config, "teacher", teacher, f"{EVALUATE}/teacher")
    if start is not None:
        yield from _score(config, "start", start, f"{EVALUATE}/start")


def _handing_over(config: PipelineConfig) -> Iterator[Task]:
    if config.export is not None:
        yield Task(EXPORT, config.export, compress_commands.EXPORT, EXPORT)
    if config.smoke is not None:
        yield Task(SMOKE, config.smoke, smoke.STAGE, SMOKE, gives=(smoke.TEXTS,))


def _score(config: PipelineConfig, role: str, model: str, place: str) -> Iterator[Task]:
    if config.evaluate is None:
        return
    gives = ("results.jsonl",) if config.evaluate.problems is not None else ("summary.json",)
    stage = dataclasses.replace(config.evaluate, model=model)
    yield Task(f"{EVALUATE}-{role}", stage, evaluate_commands.EVALUATE, place, gives=gives)


def _first_model(config: PipelineConfig) -> str | None:
    """The model that compression starts from, where no student is trained."""
    if config.recover is not None:
        return config.recover.prune.model
    return config.quantize.model if config.quantize is not None else None


def cache_parts(config: PipelineConfig) -> list[CacheStageConfig]:
    """What is to be stored: uncut traces, and every cut whose sequences do not begin with the uncut ones' tokens."""
    assert config.cache is not None and config.distill is not None
    runs = [config.distill]
    runs += [planned.config for planned in plan_runs(config.sweep)] if config.sweep is not None else []
    runs += [config.recover.distill] if config.recover is not None else []
    parts: dict[str, CacheStageConfig] = {}
    for run in runs:
        if run.teacher.cache is None:
            continue
        for cut in (UNCUT, run.truncation):
            if cut == UNCUT or not _begins_the_uncut(cut):
                part = _part(config, run, cut)
                parts.setdefault(repr(part), part)
    return list(parts.values())


def _part(config: PipelineConfig, run: DistillConfig, cut: TruncationConfig) -> CacheStageConfig:
    assert config.cache is not None and run.teacher.model is not None
    segments: Preset = "prompt+cot+answer" if "prompt" in run.supervision.preset else "cot+answer"
    return CacheStageConfig(
        teacher=run.teacher.model,
        traces=run.traces,
        select=run.select,
        max_trace_tokens=run.max_trace_tokens,
        render=run.render,
        truncation=cut,
        segments=segments,
        cache=config.cache,
    )


def _begins_the_uncut(cut: TruncationConfig) -> bool:
    return cut.mask_only or (cut.policy in _FROM_THE_FRONT and not cut.keep_ending)


def call_cache(config: CachePartsConfig, out: Path, resume: bool) -> dict[str, Any]:
    """Bring the cache to hold all parts; one of another teacher or form is made anew."""
    tokens, flops = 0, 0
    for part in config.parts:
        try:
            found = caching.run(part, out)
        except PairError:
            shutil.rmtree(out)
            found = caching.run(part, out)
        if found.metrics["shards_written"]:
            ledger = found.cost
            tokens, flops = tokens + ledger["tokens"], flops + ledger["flops"]["total"]
    return {"tokens": tokens, "flops": flops}


def call_sweep(config: SweepConfig, out: Path, resume: bool) -> dict[str, Any]:
    """Train and score all runs, each in a process of its own; the sum of what they took, and the highest memory."""
    return {"peak_bytes": execute.run(config, out).metrics["peak_bytes"]}


def call_distill(config: ChosenStudentConfig, out: Path, resume: bool) -> dict[str, Any] | None:
    """Train the student, or take it over from the sweep."""
    distill = config.distill
    if config.choice is not None and config.source is not None:
        choice = read_choice(Path(config.choice))
        distill = with_axes(distill, choice["axes"])
        trained = Path(config.source) / "runs" / choice["run"]
        if Checkpoint(trained).is_made_of(distill, train.inputs_of(distill)):
            _take_over(trained, distill, out)
            return {"taken_from": f"{SWEEP}/{choice['run']}", "tokens": 0, "flops": 0}
    train.run(distill, out, how=How(overwrite=True, resume=resume))
    return None


def _take_over(trained: Path, config: DistillConfig, out: Path) -> None:
    """Copy a run of the sweep, without its score: that is of the sweep's problems."""
    with output_directory(out, overwrite=True) as working:
        for file in sorted(trained.iterdir()):
            if file.is_file() and file.name != MANIFEST:
                shutil.copyfile(file, working / file.name)
        manifest = Checkpoint(trained).manifest
        parts = {name: manifest[name] for name in ("ledger", "metrics", "counts", "inputs")}
        write_manifest(working, stage="distill", config=config, **parts)


def call_recover(config: SmallerConfig, out: Path, resume: bool) -> None:
    """Prune and train in turns."""
    settings = config.recover
    if config.choice is not None:
        axes = read_choice(Path(config.choice))["axes"]
        settings = dataclasses.replace(settings, distill=with_axes(settings.distill, axes))
    recover.run(settings, out, how=How(overwrite=True, resume=resume))
