"""Recipes for reasoning compared over seeds on the built-in pair: tiny-teacher to tiny-student, chains of 4 to 6 steps.

`stages`: at equal optimizer steps, forward KL on the teacher's traces only, on the student's rollouts only, and first
one, then the other (2502.14305). `precision`: the two stages with rollouts written in float32, in int8, and in int8
with the loss weighed by truncated importance weights. `cuts`: at an equal share of the cost of training on everything
(`--match tokens` or `flops`), fewer whole traces, the first half of each, each up to where the teacher already knows
the answer (`limbeck traces probe`), and KD on the positions of highest teacher entropy or divergence; with and without
the ending kept.

Score: share of 200 held-out problems answered right, greedy. A row is the mean over seeds with the 95 % t-interval;
every seed has its own order of the traces, all share traces, problems and starting student. Retention divides by the
full run of the same seed. Cost counts student, teacher and sampling; probing is paid once and stands apart.

    python benchmarks/reasoning_recipes.py stages [--only ARM ...] [--quick] [--seeds 5] [--threads 2]
        [--scratch DIR] [--out DIR]
    python benchmarks/reasoning_recipes.py precision --seeds 3 [...]
    python benchmarks/reasoning_recipes.py cuts --match flops [...]

Runs that are finished in the scratch directory are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _chain
import torch
from _process import conditions, markdown, publish

from limbeck.checkpoint import Checkpoint
from limbeck.config import build, to_dict
from limbeck.demo import DemoConfig
from limbeck.distill import train
from limbeck.distill.config import DistillConfig
from limbeck.evaluate.run import EvaluateConfig
from limbeck.evaluate.stage import EvaluateStageConfig, score
from limbeck.flags import set_field
from limbeck.stage import How
from limbeck.traces import probe
from limbeck.traces.sources import TraceConfig

COSTS = ("tokens", "flops", "seconds")
STEPS = 120
"""Optimizer steps of every arm of `stages`: one pass over the traces."""
BUDGET = 0.45
"""Share of the full run's cost that every arm of `cuts` gets."""
ROLLOUTS = {"max_new_tokens": 200, "temperature": 0.9, "max_staleness_steps": 3, "batch_size": 64}
STAGES: dict[str, dict[str, Any]] = {
    "given traces": {"on_policy": None},
    "on-policy": {"on_policy": {**ROLLOUTS, "start_fraction": 0.0}},
    "two stages": {"on_policy": {**ROLLOUTS, "start_fraction": 0.5}},
    "two stages, rollouts of 32 tokens": {"on_policy": {**ROLLOUTS, "start_fraction": 0.5, "max_new_tokens": 32}},
}
TWO_STAGES = {**ROLLOUTS, "start_fraction": 0.5}
PRECISIONS: dict[str, dict[str, Any]] = {
    "two stages, float32": {"on_policy": TWO_STAGES},
    "two stages, int8": {"on_policy": {**TWO_STAGES, "precision": "int8"}},
    "two stages, int8, weighed": {"on_policy": {**TWO_STAGES, "precision": "int8", "importance_limit": 2.0}},
}
CUTS: dict[str, dict[str, Any]] = {
    "whole traces": {},
    "lead 0.5": {"lead_fraction": 0.5},
    "lead 0.5, ending kept": {"lead_fraction": 0.5, "keep_ending": True},
    "probed": {"truncation.policy": "probed"},
    "probed, ending kept": {"truncation.policy": "probed", "keep_ending": True},
    "entropy, top 0.3": {"supervision.select": {"by": "teacher_entropy", "fraction": 0.3}},
    "divergence, top 0.3": {"supervision.select": {"by": "divergence", "fraction": 0.3}},
}
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % points of Student's t by degrees of freedom."""


class Bench:
    """Traces, problems and the directory of finished runs."""

    def __init__(self, scratch: Path, quick: bool, threads: int) -> None:
        self.scratch, self.threads = scratch, threads
        self.size = DemoConfig(num_traces=120 if quick else 2000, num_problems=20 if quick else 200)
        traces = _chain.sample_traces(self.size, scratch / "traces")
        self.sweep = _chain.sweep_config(self.size, traces)
        probing = probe.ProbeConfig(traces=TraceConfig(source=str(traces)), teacher=_chain.TEACHER, every_tokens=1)
        if not (scratch / "probed").exists():
            probe.run(probing, scratch / "probed")
        self.probing = Checkpoint(scratch / "probed").manifest
        self.traces = scratch / "probed" / "traces.jsonl"

    def config(self, seed: int, changes: Mapping[str, Any]) -> DistillConfig:
        """The demo's run, KD only, on the probed traces."""
        tree = to_dict(self.sweep.distill)
        fixed = {"training.seed": seed, "training.num_threads": self.threads, "loss.kd_ratio": 1.0}
        for path, value in {"traces.source": str(self.traces), **fixed, **changes}.items():
            set_field(DistillConfig, tree, path, value, flag=path)
        return build(DistillConfig, tree)

    def run(self, name: str, seed: int, changes: Mapping[str, Any], is_scored: bool = True) -> dict[str, Any]:
        """Train and score one student, or read what is there."""
        out = self.scratch / "runs" / f"{name.replace(' ', '_')}-{seed}"
        config = self.config(seed, changes)
        if not Checkpoint(out).is_finished:
            train.run(config, out, how=How(overwrite=True))
        ledger = Checkpoint(out).manifest["ledger"]
        found = {
            "tokens": ledger["tokens"],
            "flops": ledger["flops"]["total"],
            "sampling_flops": ledger["flops"]["sampling"],
            "seconds": ledger["train_seconds"],
            "steps": ledger["steps"],
        }
        if not is_scored:
            return found
        if not (out / "summary.json").exists():
            evaluate = EvaluateConfig(max_new_tokens=320, batch_size=self.size.num_problems)
            score(str(out), EvaluateStageConfig(model="", problems=self.sweep.problems, evaluate=evaluate), out)
        summary = json.loads((out / "summary.json").read_text())
        wanted = ("accuracy", "stop_rate", "output_tokens")
        return found | {key: summary[key] for key in wanted}


def compare_steps(
    bench: Bench, arms: Mapping[str, dict[str, Any]], seeds: Sequence[int], quick: bool
) -> dict[str, list[dict[str, Any]]]:
    """These arms at the same number of steps."""
    steps = {"training.max_steps": 6 if quick else STEPS}
    return {name: [bench.run(name, seed, changes | steps) for seed in seeds] for name, changes in arms.items()}


def compare_cuts(
    bench: Bench, arms: Sequence[str], seeds: Sequence[int], match: str
) -> dict[str, list[dict[str, Any]]]:
    """The full run, then these arms of CUTS at BUDGET of its tokens or FLOPs."""
    found = {"everything": [bench.run("everything", seed, {}) for seed in seeds]}
    full = found["everything"][0]
    for name in arms:
        changes, tokens = CUTS[name], BUDGET * full["tokens"]
        if match == "flops":
            pilot = bench.run(f"pilot {name}", 0, changes | {"training.max_steps": 12}, is_scored=False)
            tokens = BUDGET * full["flops"] * pilot["tokens"] / pilot["flops"]
        limit = {"training.max_tokens": max(1, round(tokens))}
        found[name] = [bench.run(f"{match} {name}", seed, changes | limit) for seed in seeds]
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % t-interval; without an interval for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = T_QUANTILES.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def table_of(found: dict[str, list[dict[str, Any]]], reference: str) -> tuple[str, dict[str, Any]]:
    """One row an arm, and its numbers by name."""
    rows, keys = [], {}
    for name, runs in found.items():
        pairs = list(zip(runs, found[reference], strict=True))
        accuracy = interval([run["accuracy"] for run in runs])
        ratio = interval([run["accuracy"] / full["accuracy"] if full["accuracy"] else math.nan for run, full in pairs])
        difference = interval([run["accuracy"] - full["accuracy"] for run, full in pairs])
        cost = {key: statistics.fmean(run[key] / full[key] for run, full in pairs) for key in COSTS}
        rows.append(
            [
                name,
                *(f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in (accuracy, difference, ratio)),
                *(f"{cost[key]:.2f}" for key in COSTS),
                f"{statistics.fmean(run['stop_rate'] for run in runs):.2f}",
                f"{statistics.fmean(run['output_tokens'] for run in runs):.0f}",
            ]
        )
        keys[name] = {"accuracy": accuracy, "difference": difference, "retention": ratio, **cost}
    columns = ["recipe", "score (95 %)", f"minus {reference}", "retention", *COSTS, "stop rate", "output tokens"]
    return markdown(columns, rows), keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", choices=("stages", "precision", "cuts"))
    parser.add_argument("--match", choices=("tokens", "flops"), default="flops")
    parser.add_argument(
        "--only", nargs="+", metavar="ARM", choices=[*STAGES, *PRECISIONS, *CUTS], help="these arms instead of all"
    )
    parser.add_argument("--quick", action="store_true", help="120 traces, one seed: shows that it runs, nothing else")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="where runs are kept; a temporary directory by default")
    parser.add_argument("--out", type=Path, help="directory for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ("torch", "transformers"))
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options.scratch or Path(temporary), options.quick, options.threads)
        seeds = range(1 if options.quick else options.seeds)
        if options.comparison != "cuts":
            table, reference = {
                "stages": (STAGES, "given traces"),
                "precision": (PRECISIONS, "two stages, float32"),
            }[options.comparison]
            name = f"recipes_{options.comparison}"
            found = compare_steps(bench, {arm: table[arm] for arm in options.only or table}, seeds, options.quick)
        else:
            arms, reference = options.only or list(CUTS), "everything"
            found = compare_cuts(bench, arms, seeds, options.match)
            name = f"recipes_cuts_{options.match}"
        page, keys = table_of(found, reference)
    probing = bench.probing
    note = (
        f"Probing: {probing['counts']['with_cut_point']} of {probing['counts']['traces']} traces have a cut point, at "
        f"{probing['metrics']['mean_kept_fraction']:.2f} of the sequence in the mean; "
        f"{probing['ledger']['flops']['total'] / 1e12:.3f} TFLOP and {probing['ledger']['seconds']['teacher']:.0f} s, "
        "once."
    )
    publish(name, __doc__, header, page + "\n\n" + note, keys, found, options.out)


if __name__ == "__main__":
    main()
