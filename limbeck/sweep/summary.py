"""What a finished sweep says: one row a run, from its manifest and its evaluation, beside teacher and base students."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.checkpoint import Checkpoint, versions
from limbeck.config import to_dict
from limbeck.distill.data import UNCUT
from limbeck.evaluate.metrics import Interval, paired_gain, paired_retention
from limbeck.evaluate.run import problem_scores
from limbeck.models.load import load_tokenizer
from limbeck.sweep.plan import PlannedRun, SweepConfig, base_directory, reference_of, tokenizer_name
from limbeck.traces.rendering import render_traces
from limbeck.traces.sample import Sample
from limbeck.traces.sources import read_traces
from limbeck.traces.stats import trace_stats


def summarise(
    sweep: SweepConfig,
    runs: Sequence[PlannedRun],
    models: Mapping[Path, dict[str, Any]],
    store: dict[str, Any] | None,
    out: Path,
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """What the report reads: one row a run, from its manifest and its evaluation.

    Args:
      models: metrics of the teacher and of every base student, by directory.
      failed: why a run failed, by name; its row holds the reason and no numbers.
    """
    first = runs[0].config
    tokenizer = load_tokenizer(tokenizer_name(first))
    traces = [trace for source in first.all_sources for trace in read_traces(source.traces)[0]]
    samples = render_traces(traces, tokenizer, first.render, first.max_trace_tokens, first.traces.on_bad).samples
    teacher, base = models.get(out / "teacher"), models.get(out / "base")
    bases = {place: model for place, model in models.items() if place != out / "teacher"}
    finished = [run for run in runs if run.name not in failed]
    return {
        "title": sweep.title,
        "command": ["limbeck", *sys.argv[1:]],
        "teacher": teacher,
        "base": base,
        "bases": list(bases.values()),
        "teacher_accuracy": teacher and teacher["accuracy"],
        "base_accuracy": base and base["accuracy"],
        "axes": list(runs[0].axes),
        "match": sweep.match,
        "task": {
            "name": sweep.problems.source,
            "num_problems": _evaluation(out, finished[0])["num_problems"],
            "num_samples": sweep.evaluate.num_samples,
            "temperature": sweep.evaluate.temperature,
        },
        "runs": [
            _axes(planned) | {"failed": failed[planned.name]}
            if planned.name in failed
            else _row(planned, reference_of(planned, finished), base_directory(sweep, planned, out), out)
            for planned in runs
        ],
        "store": store,
        "trace_stats": _trace_facts(samples),
        "config": to_dict(sweep),
        "versions": versions(),
        "machine": Checkpoint(out / "runs" / finished[0].name).manifest["machine"],
    }


def _trace_facts(samples: Sequence[Sample]) -> dict[str, Any]:
    stats = trace_stats(samples, UNCUT)
    shares = {f"{name}_token_fraction": part["token_fraction"] for name, part in stats["segments"].items()}
    derivation = {f"first_derivation_{name}": value for name, value in stats["first_derivation"].items()}
    return {"num_traces": stats["num_traces"], "mean_tokens": stats["tokens"]["mean"], **shares, **derivation}


def _axes(planned: PlannedRun) -> dict[str, Any]:
    """What a run is, before anything is measured."""
    return {
        "name": planned.name,
        "lead_fraction": planned.config.truncation.lead_fraction,
        "keep_ending": planned.config.truncation.keep_ending,
        "seed": planned.config.training.seed,
        **planned.axes,
        "control": bool(planned.control_of),
        "control_of": list(planned.control_of),
        "student": planned.config.student.model,
        "learning_rate": planned.config.optimizer.learning_rate,
        "learning_rates_tried": [
            {"learning_rate": rate, "validation_ce": loss if np.isfinite(loss) else None}
            for rate, loss in planned.tried
        ],
    }


def _row(planned: PlannedRun, reference: PlannedRun | None, base: Path, out: Path) -> dict[str, Any]:
    manifest = Checkpoint(out / "runs" / planned.name).manifest
    evaluation, ledger = _evaluation(out, planned), manifest["ledger"]
    nothing = Interval(np.nan, np.nan, np.nan)
    retention, gain = nothing, nothing
    scores, of_base = _scores(_scored(out, planned)), _scores(base)
    if reference is not None:
        whole = _scores(_scored(out, reference))
        retention, gain = paired_retention(scores, whole), paired_gain(scores, whole, of_base)
    return {
        **_axes(planned),
        **{key: value for key, value in evaluation.items() if key not in ("model", "num_problems")},
        **_with_ends("retention", retention),
        **_with_ends("gain_kept", gain),
        "base_accuracy": float(of_base.mean()),
        "problem_scores": problem_scores(_scored(out, planned)),
        "tokens": ledger["tokens"],
        "flops": ledger["flops"]["total"],
        **{f"flops_{part}": ledger["flops"][part] for part in ("teacher", "student", "head")},
        "train_seconds": ledger["train_seconds"],
        "seconds": ledger["seconds"],
        "peak_bytes": ledger["peak_bytes"]["total"],
        "peak_bytes_parts": ledger["peak_bytes"],
        "validation_ce": manifest["metrics"]["validation_ce"],
        "rollout_mismatch_nats": manifest["metrics"].get("rollout_mismatch_nats"),
        "sources": manifest["metrics"].get("sources"),
        "lost_end_marker_fraction": manifest["counts"]["lost_end_marker_fraction"],
        "lost_first_derivation_fraction": manifest["counts"]["lost_first_derivation_fraction"],
        "flops_audit": ledger["flops_audit"],
    }


def _with_ends(name: str, interval: Interval) -> dict[str, float | None]:
    """A value and the ends of its interval by name; what is no finite number is None."""
    values = {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {key: float(value) if np.isfinite(value) else None for key, value in values.items()}


def _scored(out: Path, planned: PlannedRun) -> Path:
    return out / "runs" / planned.name / "evaluation"


def _evaluation(out: Path, planned: PlannedRun) -> dict[str, Any]:
    return json.loads((_scored(out, planned) / "summary.json").read_text(encoding="utf-8"))


def _scores(evaluation: Path) -> np.ndarray:
    """Mean score of every problem, in order."""
    file = evaluation / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return np.array([np.mean([verdict == "right" for verdict in row["verdicts"]]) for row in rows])
