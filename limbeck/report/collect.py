"""Read what runs left behind: `summary.json` of sweeps, `limbeck.json` and the evaluation of single runs.

Everything becomes one list of rows. Runs from a sweep bring their axes; of single runs, the config fields that differ
are the axes. Compressed models are a list of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.checkpoint import MANIFEST, Checkpoint
from limbeck.errors import CheckpointError
from limbeck.evaluate.run import problem_scores
from limbeck.report.advised import STAGE as ADVICE
from limbeck.report.advised import Advised, read_advice
from limbeck.report.compressed import EVALUATION, STAGES, Compressed, read_compressed
from limbeck.report.files import object_in, read_object
from limbeck.report.logs import read_curves
from limbeck.report.pipelined import STAGE as PIPELINE
from limbeck.report.pipelined import Along, StageRow, read_models, read_steps, shown_by
from limbeck.report.ranked import EVALUATION as RANK_EVALUATION
from limbeck.report.ranked import STAGES as RANKING
from limbeck.report.ranked import RankedModel, read_ranking
from limbeck.report.rows import FLOP_PARTS, PLACED_AXES, Row, row_of, rows_of

SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What one sweep says about all of its runs."""

    label: str
    title: str = ""
    command: tuple[str, ...] = ()
    match: str | None = None
    task: Mapping[str, Any] = field(default_factory=dict)
    store: Mapping[str, Any] = field(default_factory=dict)
    trace_stats: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[Row, ...] = ()
    """Teacher and base student, as far as they were scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """All that a report is made of."""

    rows: tuple[Row, ...]
    sources: tuple[Source, ...]
    compressed: tuple[Compressed, ...] = ()
    """Pruned, quantised and recovered models, and those that they were made of."""
    ranking: tuple[RankedModel, ...] = ()
    """Models of ranking pipelines."""
    steps: tuple[StageRow, ...] = ()
    """Stages of pipelines."""
    along: tuple[Along, ...] = ()
    """Models that pipelines scored along the way."""
    advice: tuple[Advised, ...] = ()
    """What looks at pairs recommend."""

    @property
    def models(self) -> tuple[Row, ...]:
        """Teacher and base students of all sources, each once."""
        models = [row for source in self.sources for row in source.models]
        return tuple({(row.name, row.get("accuracy")): row for row in models}.values())


def collect(paths: Sequence[Path]) -> Evidence:
    """Read sweep directories, single run directories, directories of compressed models and of pipelines.

    Args:
      paths: directories with a `summary.json` of a sweep, or with a `limbeck.json` of a distilled student, a
        compressed model or a pipeline; what a pipeline made is read as if it were named behind it.
    Returns: their rows in the order given.
    Raises: CheckpointError when a directory is none of them, a file is damaged, or there is no run at all.
    """
    if not paths:
        raise CheckpointError("report: no directory named; name at least one sweep or run directory.")
    named, pipelines = paths, _of_stage(paths, (PIPELINE,))
    paths = list(itertools.chain.from_iterable((path, *_shown(path, pipelines)) for path in named))
    several = sum(map(_is_sweep, paths)) > 1
    read = {path: _read(path, several) for path in paths}
    runs = [(path, read[path][0]) for path in _of_stage(paths, ("distill",))]
    of_sweeps = itertools.chain.from_iterable(rows for _, rows in read.values())
    return Evidence(
        rows=(*of_sweeps, *_rows_of_runs(runs)),
        sources=tuple(read[path][0] for path in paths if path in named or _is_sweep(path)),
        compressed=tuple(read_compressed(_of_stage(paths, STAGES))),
        ranking=tuple(read_ranking(_of_stage(paths, RANKING))),
        steps=tuple(read_steps(pipelines)),
        along=tuple(read_models(pipelines)),
        advice=tuple(read_advice(_of_stage(paths, (ADVICE,)))),
    )


def _shown(path: Path, pipelines: Sequence[Path]) -> Iterable[Path]:
    return shown_by(path) if path in pipelines else ()


def _of_stage(paths: Sequence[Path], stages: Container[str]) -> list[Path]:
    """The directories that one of the stages wrote."""
    return [path for path in paths if not _is_sweep(path) and _stage(path) in stages]


def _read(path: Path, several: bool) -> tuple[Source, list[Row]]:
    """What a directory says of itself, and the rows of a sweep; with several sweeps these carry its label."""
    if _is_sweep(path):
        return _read_sweep(path, label=path.resolve().name if several else "")
    return _read_run(path), []


def _is_sweep(path: Path) -> bool:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory. Name a directory that a sweep or a run has written.")
    if not (path / SUMMARY).is_file() and not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path}: holds neither {SUMMARY} (a finished sweep) nor {MANIFEST} (a finished run); finish the run first."
        )
    is_scored = (path / MANIFEST).is_file() and _stage(path) == RANK_EVALUATION
    return (path / SUMMARY).is_file() and not is_scored


def _read_sweep(path: Path, label: str) -> tuple[Source, list[Row]]:
    file = path / SUMMARY
    tree = read_object(file)
    runs, axes = _runs_and_axes(tree, file)
    names = ("task", "store", "trace_stats", "config", "versions", "machine")
    parts: dict[str, Any] = {name: object_in(tree, name, file) for name in names}
    bases = tree.get("bases") or [object_in(tree, "base", file)]
    models = [
        row_of({**model, "name": f"{role}: {model.get('name', role)}"}, (), f"{file}: {role}", label)
        for role, model in (("teacher", object_in(tree, "teacher", file)), *(("base", base) for base in bases))
        if model
    ]
    source = Source(
        label=label or path.resolve().name,
        title=str(tree.get("title") or ""),
        command=_words(tree.get("command")),
        match=str(tree["match"]) if tree.get("match") else None,
        models=tuple(models),
        **parts,
    )
    logged = [
        {**run, "curves": read_curves(path / "runs" / str(run.get("name")))} if isinstance(run, dict) else run
        for run in runs
    ]
    return source, rows_of(logged, axes, str(file), label)


def _runs_and_axes(tree: Mapping[str, Any], file: Path) -> tuple[list[Any], list[str]]:
    runs, axes = tree.get("runs"), tree.get("axes") or []
    if not isinstance(runs, list) or not runs:
        raise CheckpointError(f"{file}: `runs` must be a list with at least one run; run the sweep again.")
    if not isinstance(axes, list) or not all(isinstance(axis, str) for axis in axes):
        raise CheckpointError(f"{file}: `axes` must be a list of names; run the sweep again.")
    return runs, axes


def _read_run(path: Path) -> Source:
    file = path / MANIFEST
    manifest = read_object(file)
    if (stage := _stage(path)) not in ("distill", ADVICE, PIPELINE, *RANKING, *STAGES):
        raise CheckpointError(
            f"{file}: stage {stage!r} has no place in this report; name sweeps and distilled students."
        )
    parts: dict[str, Any] = {name: object_in(manifest, name, file) for name in ("config", "versions", "machine")}
    return Source(label=path.resolve().name, command=_words(manifest.get("command")), **parts)


def _stage(path: Path) -> str:
    return str(Checkpoint(path).manifest["stage"])


def _rows_of_runs(runs: Sequence[tuple[Path, Source]]) -> list[Row]:
    """Rows of single runs; the fields of their configs that differ are the axes."""
    flat = [dict(flatten(source.config)) for _, source in runs]
    axes = [key for key in _varied(flat) if key not in PLACED_AXES]
    rows = []
    for (path, source), config in zip(runs, flat, strict=True):
        tree = _run_as_row(path, source, config) | {axis: config.get(axis) for axis in axes}
        rows.append(row_of(tree, axes, str(path / MANIFEST), ""))
    return rows


def _varied(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields whose values differ."""
    keys = list(dict.fromkeys(key for config in configs for key in config))
    return [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]


def _run_as_row(path: Path, source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    file = path / MANIFEST
    manifest = read_object(file)
    ledger, metrics, counts = (object_in(manifest, name, file) for name in ("ledger", "metrics", "counts"))
    flops, peak = object_in(ledger, "flops", file), object_in(ledger, "peak_bytes", file)
    evaluation = path / EVALUATION
    return {
        **counts,
        **metrics,
        **(read_object(evaluation) if evaluation.exists() else {}),
        "problem_scores": problem_scores(evaluation.parent),
        "curves": read_curves(path),
        "name": source.label,
        "lead_fraction": config.get("truncation.lead_fraction"),
        "keep_ending": config.get("truncation.keep_ending", False),
        "seed": config.get("training.seed"),
        "tokens": ledger.get("tokens"),
        "flops": flops.get("total"),
        **{f"flops_{part}": flops.get(part) for part in FLOP_PARTS},
        "train_seconds": ledger.get("train_seconds"),
        "peak_bytes": peak.get("total"),
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a tree of objects by dotted path; lists count as leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _words(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()
