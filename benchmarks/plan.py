"""Predicted against measured: FLOPs, peak memory and seconds of runs, planned before they start.

Regime: the built-in and the SmolLM2 recipes made small (fewer steps, the same micro-batches), each in a process of its
own through the command line, float32 on a CPU: text alone and with a live teacher, several cuts, both layouts, another
optimizer, adapters, recomputation, students from scratch, rollouts, a teacher cache, recovery in rounds, and `limbeck
demo` (its sweep and its recovery). Predictions are made here, before a run (the demo's after it), from the same config.

Measured is what the run's ledger holds: `flops.total` by the formulas, which the first micro-batch of every run also
counts with torch's counter (`flops_audit`: the key `audit_error_max`), and `peak_bytes.total`, the growth of the
resident set. Bound: FLOPs within 2 %, memory within 15 %. Seconds are a roofline of this machine as busy as it is, and
not judged.

    python benchmarks/plan.py [--quick] [--threads 1] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _process import conditions, markdown, publish

from limbeck.checkpoint import Checkpoint
from limbeck.compress.predict import predict_recover
from limbeck.compress.recover import RecoverConfig
from limbeck.config import build
from limbeck.cost.hardware import Hardware, measure
from limbeck.cost.prediction import Prediction
from limbeck.distill.caching import CacheStageConfig
from limbeck.distill.caching_cost import predict_cache
from limbeck.distill.config import DistillConfig
from limbeck.distill.predict import predict_distill
from limbeck.flags import apply_flags
from limbeck.yaml_values import read_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
STAGES: dict[str, tuple[type, Callable[..., Prediction]]] = {
    "distill": (DistillConfig, predict_distill),
    "teacher cache": (CacheStageConfig, predict_cache),
    "recover": (RecoverConfig, predict_recover),
}
TINY = [
    "--student.model", "tiny-student", "--teacher.model", "tiny-teacher", "--traces.source", "builtin:chain",
    "--num-traces", "400", "--chain-min-steps", "4", "--chain-max-steps", "6", "--num-validation", "32",
    "--training.batch-size", "16", "--training.epochs", "1",
]  # fmt: skip
SMOLLM2 = [
    "--student.model", "smollm2-135m", "--traces.source", "reasoning-gym:gsm_symbolic", "--num-traces", "60",
    "--traces.seed", "1", "--num-validation", "8", "--truncation.unit", "response", "--training.batch-size", "8",
    "--training.microbatch-tokens", "1024", "--training.max-steps", "4",
]  # fmt: skip


class Case(NamedTuple):
    """One run."""

    name: str
    command: str
    """A key of STAGES."""
    arguments: Sequence[str]
    is_quick: bool = False


def _tiny(name: str, *more: str, is_quick: bool = False) -> Case:
    return Case(f"tiny, {name}", "distill", [*TINY, *more], is_quick)


def _smollm2(name: str, *more: str) -> Case:
    return Case(f"smollm2, {name}", "distill", [*SMOLLM2, *more])


CASES = [
    *(_tiny(f"lead {x}", "--lead-fraction", x, is_quick=x != "0.75") for x in ("0.25", "0.5", "0.75", "1.0")),
    _tiny("lead 0.5, ending kept", "--lead-fraction", "0.5", "--keep-ending", "true"),
    _tiny("answers only", "--preset", "answer"),
    _tiny("padded", "--layout", "padded"),
    _tiny("micro-batches of 512", "--microbatch-tokens", "512", is_quick=True),
    _tiny("asgld", "--optimizer.name", "asgld"),
    _tiny("recomputed", "--gradient-checkpointing", "true"),
    _tiny("adapters", "--lora.rank", "8"),
    _tiny("rollouts", "--kd-ratio", "1.0", "--on-policy.start-fraction", "0.5", "--on-policy.max-new-tokens", "200"),
    Case("tiny_student.yaml", "distill", [
        str(RECIPES / "tiny_student.yaml"), "--student.model", "tiny-student", "--num-traces", "3000",
        "--training.max-tokens", "160000",
    ], True),
    Case("tiny_teacher.yaml", "distill", [
        str(RECIPES / "tiny_teacher.yaml"), "--num-traces", "3000", "--training.max-tokens", "120000",
    ]),
    Case("teacher cache", "teacher cache", [
        "--teacher", "tiny-teacher", "--traces.source", "builtin:chain", "--num-traces", "400",
        "--chain-min-steps", "4", "--chain-max-steps", "6",
    ], True),
    Case("tiny_recover.yaml", "recover", [str(RECIPES / "tiny_recover.yaml")], True),
    _smollm2("lead 1.0"),
    _smollm2("lead 0.5", "--lead-fraction", "0.5"),
    _smollm2("lead 0.5, ending kept", "--lead-fraction", "0.5", "--keep-ending", "true"),
    _smollm2("live teacher", "--teacher.model", "smollm2-135m"),
    _smollm2("recomputed", "--gradient-checkpointing", "true"),
    _smollm2("micro-batches of 2048", "--microbatch-tokens", "2048"),
    Case("smollm2_recover.yaml", "recover", [
        str(RECIPES / "smollm2_recover.yaml"), "--num-traces", "40", "--num-validation", "8", "--rounds", "2",
        "--prune.calibration.sequences", "8",
    ]),
]  # fmt: skip


def planned(case: Case, hardware: Hardware) -> Prediction:
    """The prediction of a case, from the config that the command line makes of its arguments."""
    config_class, predict = STAGES[case.command]
    arguments, tree = list(case.arguments), {}
    if not arguments[0].startswith("--"):
        tree = read_recipe(Path(arguments.pop(0)))
    return predict(build(config_class, apply_flags(config_class, tree, arguments)), hardware=hardware)


def measured(case: Case, out: Path, threads: int) -> Mapping[str, Any]:
    """The ledger of a case, run by the command line in a process of its own."""
    command = [sys.executable, "-m", "limbeck", *case.command.split(), *case.arguments, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name}: {done.stderr.strip()[-500:]}")
    return Checkpoint(out).manifest["ledger"] if case.command in STAGES else {}


def demo(out: Path, hardware: Hardware, threads: int) -> list[dict[str, Any]]:
    """A small `limbeck demo`: every run of its sweep and its recovery, planned from the configs in their manifests."""
    arguments = ["--num-traces", "400", "--num-problems", "20", "--epochs", "1"]
    measured(Case("demo", "demo", arguments), out, threads)
    rows = []
    for directory in [*sorted((out / "runs").iterdir()), out / "recovered"]:
        manifest = Checkpoint(directory).manifest
        config_class, predict = STAGES[manifest["stage"]]
        predicted = predict(build(config_class, manifest["config"]), hardware=hardware)
        rows.append(compared(Case(f"demo, {directory.name}", manifest["stage"], ()), predicted, manifest["ledger"]))
    return rows


def compared(case: Case, predicted: Prediction, ledger: Mapping[str, Any]) -> dict[str, Any]:
    """Predicted and measured side by side."""
    flops, peak, seconds = ledger["flops"]["total"], ledger["peak_bytes"]["total"], ledger["train_seconds"]
    audit = ledger.get("flops_audit") or {}
    return {
        "case": case.name,
        "predicted": predicted.as_dict(),
        "measured": {"flops": ledger["flops"], "peak_bytes": ledger["peak_bytes"], "seconds": seconds},
        "flops_error": predicted.total_flops / flops - 1,
        "peak_memory_error": predicted.peak_bytes / peak - 1,
        "seconds_ratio": predicted.seconds / seconds if seconds else None,
        "audit_error": audit["formula_flops"] / audit["counted_flops"] - 1 if audit else None,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For people."""
    lines = [
        [
            row["case"],
            f"{row['measured']['flops']['total'] / 1e9:,.1f}",
            f"{100 * row['flops_error']:+.2f} %",
            f"{row['measured']['peak_bytes']['total'] / 1e6:,.0f}",
            f"{100 * row['peak_memory_error']:+.1f} %",
            f"{row['measured']['seconds']:.1f}",
            "–" if row["seconds_ratio"] is None else f"{row['seconds_ratio']:.2f}",
        ]
        for row in rows
    ]
    columns = ["run", "GFLOP", "FLOPs predicted", "peak MB", "peak predicted", "seconds", "predicted / measured"]
    return markdown(columns, lines)


def main() -> None:
    """Predict, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the built-in models only, a few cases")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ["torch", "transformers"])
    hardware, rows = measure(), []
    chosen = [case for case in CASES if (case.is_quick or not options.quick) and (options.only or "") in case.name]
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(chosen):
            predicted = planned(case, hardware)
            rows.append(compared(case, predicted, measured(case, Path(scratch) / str(number), options.threads)))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        if not options.quick and (options.only or "demo") == "demo":
            rows += demo(Path(scratch) / "demo", hardware, options.threads)
    ratios = [row["seconds_ratio"] for row in rows if row["seconds_ratio"] is not None]
    audits = [abs(row["audit_error"]) for row in rows if row["audit_error"] is not None]
    keys = {
        "flops_error_max": max(abs(row["flops_error"]) for row in rows),
        "peak_memory_error_max": max(abs(row["peak_memory_error"]) for row in rows),
        "audit_error_max": max(audits, default=0.0),
        "seconds_ratio_min": min(ratios),
        "seconds_ratio_max": max(ratios),
        "runs": len(rows),
    }
    publish("plan", __doc__ or "", header, table(rows), keys, rows, options.out)


if __name__ == "__main__":
    main()
