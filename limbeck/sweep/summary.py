"""What a finished sweep says: one row a run, from its manifest and its evaluation, beside teacher and base student."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.checkpoint import Checkpoint, versions
from limbeck.config import to_dict
from limbeck.distill.data import UNCUT
from limbeck.evaluate.metrics import paired_retention
from limbeck.models.load import load_tokenizer
from limbeck.sweep.plan import PlannedRun, SweepConfig, reference_of, tokenizer_name
from limbeck.traces.rendering import render_traces
from limbeck.traces.sample import Sample
from limbeck.traces.sources import read_traces
from limbeck.traces.stats import trace_stats


def summarise(
    sweep: SweepConfig,
    runs: Sequence[PlannedRun],
    models: dict[str, Any],
    store: dict[str, Any] | None,
    out: Path,
) -> dict[str, Any]:
    """What the report reads: one row a run, from its manifest and its evaluation."""
    first = runs[0].config
    tokenizer = load_tokenizer(tokenizer_name(first))
    traces, _ = read_traces(first.traces)
    samples = render_traces(traces, tokenizer, first.render, first.max_trace_tokens, first.traces.on_bad).samples
    teacher, base = models.get("teacher"), models.get("base")
    return {
        "title": sweep.title,
        "command": ["limbeck", *sys.argv[1:]],
        "teacher": teacher,
        "base": base,
        "teacher_accuracy": teacher and teacher["accuracy"],
        "base_accuracy": base and base["accuracy"],
        "axes": list(runs[0].axes),
        "match": sweep.match,
        "task": {
            "name": sweep.problems.source,
            "num_problems": _evaluation(out, runs[0])["num_problems"],
            "num_samples": sweep.evaluate.num_samples,
            "temperature": sweep.evaluate.temperature,
        },
        "runs": [_row(planned, reference_of(planned, list(runs)), out) for planned in runs],
        "store": store,
        "trace_stats": _trace_facts(samples),
        "config": to_dict(sweep),
        "versions": versions(),
        "machine": Checkpoint(out / "runs" / runs[0].name).manifest["machine"],
    }


def _trace_facts(samples: Sequence[Sample]) -> dict[str, Any]:
    stats = trace_stats(samples, UNCUT)
    shares = {f"{name}_token_fraction": part["token_fraction"] for name, part in stats["segments"].items()}
    derivation = {f"first_derivation_{name}": value for name, value in stats["first_derivation"].items()}
    return {"num_traces": stats["num_traces"], "mean_tokens": stats["tokens"]["mean"], **shares, **derivation}


def _row(planned: PlannedRun, reference: PlannedRun | None, out: Path) -> dict[str, Any]:
    manifest = Checkpoint(out / "runs" / planned.name).manifest
    evaluation, ledger = _evaluation(out, planned), manifest["ledger"]
    retention: dict[str, float | None] = dict.fromkeys(("retention", "retention_low", "retention_high"))
    if reference is not None:
        ratio = paired_retention(_scores(out, planned), _scores(out, reference))
        values = (ratio.value, ratio.low, ratio.high)
        retention = {k: (float(v) if np.isfinite(v) else None) for k, v in zip(retention, values, strict=True)}
    return {
        "name": planned.name,
        "lead_fraction": planned.config.truncation.lead_fraction,
        "keep_ending": planned.config.truncation.keep_ending,
        "seed": planned.config.training.seed,
        **planned.axes,
        **{key: value for key, value in evaluation.items() if key not in ("model", "num_problems")},
        **retention,
        "tokens": ledger["tokens"],
        "flops": ledger["flops"]["total"],
        **{f"flops_{part}": ledger["flops"][part] for part in ("teacher", "student", "head")},
        "train_seconds": ledger["train_seconds"],
        "seconds": ledger["seconds"],
        "peak_bytes": ledger["peak_bytes"]["total"],
        "peak_bytes_parts": ledger["peak_bytes"],
        "validation_ce": manifest["metrics"]["validation_ce"],
        "rollout_mismatch_nats": manifest["metrics"].get("rollout_mismatch_nats"),
        "lost_end_marker_fraction": manifest["counts"]["lost_end_marker_fraction"],
        "lost_first_derivation_fraction": manifest["counts"]["lost_first_derivation_fraction"],
        "flops_audit": ledger["flops_audit"],
    }


def _evaluation(out: Path, planned: PlannedRun) -> dict[str, Any]:
    return json.loads((out / "runs" / planned.name / "evaluation" / "summary.json").read_text(encoding="utf-8"))


def _scores(out: Path, planned: PlannedRun) -> np.ndarray:
    """Mean score of every problem, in order."""
    file = out / "runs" / planned.name / "evaluation" / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return np.array([np.mean([verdict == "right" for verdict in row["verdicts"]]) for row in rows])
