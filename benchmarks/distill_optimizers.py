"""Does noise help distillation? Langevin optimizers and a growing batch against tuned AdamW on the tiny recipe.

Registered before the first run. Question: does any of perturb(adamw), asgld, asg or AdamW with a growing batch end at
a lower validation CE than AdamW, at equal tokens? Expectation: no (a pre-trained student starts near a good basin, and
AdamW leaves toy saddles by itself).
- Task: the demonstration's student and teacher, its traces with right answers, whole; stored teacher targets.
- Tuning, on a seed of its own: three learning rates for adamw and for asgld; perturb and the growing batch take
  AdamW's rate and try two radii and two rates of growth; asg takes asgld's rate. Lowest validation CE wins.
- Measurement: each tuned method on five other seeds, which change the order of the traces and the noise.
- Primary: the difference of validation CE to AdamW's of the same seed, mean with a 95 % t interval. Secondary: accuracy
  on 100 held-out problems, greedy.
- A method is called better or worse where the interval leaves out 0; there is no other test.

Bound: none; peer: torch's AdamW. All runs are printed, none is left out.

    python benchmarks/distill_optimizers.py [--quick] [--scratch DIRECTORY] [--out benchmarks/results]
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _chain import sample_traces, sweep_config
from _study import Outcome, main

from limbeck.checkpoint import Checkpoint
from limbeck.config import build, config_hash, to_dict
from limbeck.demo import DemoConfig
from limbeck.distill import train
from limbeck.distill.config import DistillConfig
from limbeck.evaluate.stage import EvaluateStageConfig, score
from limbeck.flags import set_field
from limbeck.stage import How
from studies.page import Table

T_QUANTILES = {1: 12.706, 4: 2.776}
"""Degrees of freedom -> Student's t at 0.975."""
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
NOISE = "optimizer.noise."
GATED = {NOISE + "escape_steps": 10}
METHODS: dict[str, list[dict[str, Any]]] = {
    "adamw": [{"optimizer.learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3)],
    "perturb(adamw)": [{NOISE + "noise_radius": radius, **GATED} for radius in (0.03, 0.3)],
    "asgld": [{"optimizer.learning_rate": rate, **GATED} for rate in (0.1, 0.3, 1.0)],
    "asg": [GATED],
    "adamw, growing batch": [{"training.batch_growth": {"per_step": rate, "largest": 32}} for rate in (0.1, 0.4)],
}
"""Method -> candidates of its tuning. Those without a learning rate take the tuned one of AdamW, asg that of asgld."""


def measure(quick: bool, scratch: Path) -> Outcome:
    demo = DemoConfig(num_traces=60, num_problems=10) if quick else DemoConfig(num_traces=500, num_problems=100)
    sweep = sweep_config(demo, sample_traces(demo, scratch / "traces"))
    base = dataclasses.replace(sweep.distill, num_validation=max(4, demo.num_traces // 10))
    scoring = EvaluateStageConfig(model="", problems=sweep.problems, evaluate=sweep.evaluate, render=base.render)
    seeds: Sequence[int] = SEEDS[:2] if quick else SEEDS
    chosen: dict[str, dict[str, Any]] = {}
    tuning: list[list[str]] = []
    for method, candidates in METHODS.items():
        inherited = {} if method == "asgld" else chosen.get("asgld" if method == "asg" else "adamw", {})
        tried = []
        for candidate in candidates[:1] if quick else candidates:
            changes = {**inherited, **start_of(method), **candidate}
            result = one_run(base, changes, TUNING_SEED, scratch / "runs", None)
            tried.append((result["validation_ce"], changes))
            tuning.append([method, json.dumps(candidate), f"{result['validation_ce']:.4f}"])
        chosen[method] = min(tried, key=lambda entry: entry[0])[1]
    results = {
        method: [one_run(base, changes, seed, scratch / "runs", scoring) for seed in seeds]
        for method, changes in chosen.items()
    }
    keys, table = compare(results)
    notes = [f"Seeds {list(seeds)}; tuned on seed {TUNING_SEED}. Lower CE is better."]
    every = [
        [method, str(seed), f"{row['validation_ce']:.4f}", f"{row['accuracy']:.3f}"]
        for method, rows in results.items()
        for seed, row in zip(seeds, rows, strict=True)
    ]
    tables = {
        "Against AdamW": table,
        "Every run": (["method", "seed", "validation CE", "accuracy"], every),
        "Tuning": (["method", "candidate", "validation CE"], tuning),
    }
    return keys | {"chosen": chosen}, tables, notes


def start_of(method: str) -> dict[str, Any]:
    return {"optimizer.name": method.split(",")[0], "optimizer.momentum": 0.9}


def one_run(
    base: DistillConfig, changes: dict[str, Any], seed: int, runs: Path, scoring: EvaluateStageConfig | None
) -> dict[str, float]:
    """Train, score where asked; a run that is there already is read."""
    tree = to_dict(base)
    for path, value in {**changes, "training.seed": seed, NOISE + "noise_seed": seed}.items():
        set_field(DistillConfig, tree, path, value, flag=path)
    config = build(DistillConfig, tree)
    out = runs / config_hash(config)
    if not Checkpoint(out).is_finished:
        train.run(config, out, how=How(overwrite=True))
    result = {"validation_ce": Checkpoint(out).manifest["metrics"]["validation_ce"]}
    if scoring is None:
        return result
    saved = out / "score.json"
    if not saved.exists():
        summary = score(str(out), dataclasses.replace(scoring, model=str(out)), out)
        saved.write_text(json.dumps({"accuracy": summary["accuracy"]}))
    return result | json.loads(saved.read_text())


def compare(results: dict[str, list[dict[str, float]]]) -> tuple[dict[str, Any], Table]:
    keys: dict[str, Any] = {}
    rows = []
    reference = results["adamw"]
    for method, runs in results.items():
        loss = [run["validation_ce"] for run in runs]
        right = statistics.fmean(run["accuracy"] for run in runs)
        differences = [
            run["validation_ce"] - other["validation_ce"] for run, other in zip(runs, reference, strict=True)
        ]
        low, high = t_interval(differences)
        verdict = "" if method == "adamw" else "better" if high < 0 else "worse" if low > 0 else "no difference seen"
        keys[f"ce_difference_{method}"] = [statistics.fmean(differences), low, high]
        keys[f"accuracy_{method}"] = right
        shown = "" if method == "adamw" else f"{statistics.fmean(differences):+.4f} ({low:+.4f} to {high:+.4f})"
        rows.append([method, f"{statistics.fmean(loss):.4f}", shown, f"{right:.3f}", verdict])
    return keys, (["method", "validation CE", "over AdamW (95 % t interval)", "accuracy", "verdict"], rows)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of a few paired differences."""
    if len(values) < 2 or len(set(values)) == 1:
        return values[0], values[0]
    half = T_QUANTILES[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


if __name__ == "__main__":
    main("distill_optimizers", __doc__ or "", measure)
