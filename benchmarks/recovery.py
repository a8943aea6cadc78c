"""Recovery after pruning compared over seeds: in turns against at once, distilled against trained on the text alone.

The recipe's model loses part of its MLP neurons by OSSCAR and is trained back on the recipe's traces, with itself as it
was for a teacher; by default the built-in student on short chains of the built-in task. `gradual` removes the same
neurons in three turns, each followed by a third of the training; `one-shot` removes them at once. `KD` is forward KL
only, `SFT` cross-entropy only. All arms train on the same number of tokens, to within a step, and write the weights of
the lowest held-out KL to the unpruned model.

Score: share of held-out problems answered right, greedy. A row is the mean over seeds with the 95 % t-interval; seeds
differ in the order of the traces. Differences are paired by seed. FLOPs and seconds are those of pruning and training.

    python benchmarks/recovery.py [--seeds 5] [--epochs 1] [--quick] [--scratch DIR] [--out DIR]
    python benchmarks/recovery.py --recipe recipes/smollm2_recover.yaml --seeds 1 --problems 0 --shares [--scratch DIR]

Runs that are finished in the scratch directory are not run again; one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _process import conditions, markdown, publish
from reasoning_recipes import interval

from limbeck.checkpoint import Checkpoint
from limbeck.compress import recover
from limbeck.compress.prune import stage as prune
from limbeck.compress.recover import RecoverConfig
from limbeck.config import build
from limbeck.distill import train
from limbeck.evaluate.run import EvaluateConfig
from limbeck.evaluate.stage import EvaluateStageConfig, score
from limbeck.stage import How
from limbeck.traces.sources import TraceConfig
from limbeck.yaml_values import read_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_recover.yaml"
ARMS: dict[str, tuple[int, float]] = {
    "one-shot, KD": (1, 1.0),
    "gradual, KD": (3, 1.0),
    "one-shot, SFT": (1, 0.0),
    "gradual, SFT": (3, 0.0),
}
"""Rounds and share of KD."""
REFERENCE = "one-shot, KD"
SHARES = (0.5, 0.75)
"""Further cuts that are shown without training: what the neurons are worth."""
COSTS = ("tokens", "flops", "seconds")
PROBLEM_SEED = 1_000_001


class Study:
    """The recipe, the problems and the directory of finished runs."""

    def __init__(self, scratch: Path, options: argparse.Namespace) -> None:
        quick = options.quick
        self.scratch, self.epochs, self.threads, self.shares = scratch, options.epochs, options.threads, options.shares
        self.tree = read_recipe(options.recipe)
        traces = self.tree["distill"]["traces"]
        if quick:
            traces["num_traces"] = 100
        self.problems = 10 if quick else options.problems

    def config(self, seed: int, rounds: int, kd_ratio: float) -> RecoverConfig:
        """The recipe with one arm's choices."""
        distill = self.tree["distill"]
        training = {**distill["training"], "epochs": self.epochs, "seed": seed, "num_threads": self.threads}
        arm = {**distill, "training": training, "loss": {"kd_ratio": kd_ratio}}
        return build(RecoverConfig, {**self.tree, "rounds": rounds, "distill": arm})

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Recover and score one model, or read what is there."""
        out = self.place(name, seed)
        if not Checkpoint(out).is_finished:
            recover.run(self.config(seed, *ARMS[name]), out, how=How(resume=True))
        metrics = Checkpoint(out).manifest["metrics"]
        rounds = metrics["rounds"]
        return {
            "accuracy": self.accuracy(str(out), out),
            "kl": metrics["validation_kl"],
            "ce": metrics["validation_ce"],
            "parameters": metrics["parameters"],
            "tokens": sum(r["tokens"] for r in rounds),
            "flops": sum(r["flops"] for r in rounds),
            "seconds": sum(r["prune_seconds"] + r["train_seconds"] for r in rounds),
            "rounds": rounds,
            "unpruned": metrics["unpruned"],
        }

    def place(self, name: str, seed: int) -> Path:
        """Directory of one run."""
        return self.scratch / f"{name.replace(', ', '-')}-{self.epochs}-epochs-{seed}"

    def accuracy(self, model: str, out: Path) -> float:
        """Share of the problems answered right, NaN where there are none; kept in `out`."""
        if not self.problems:
            return math.nan
        if not (out / "summary.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            traces = {**self.tree["distill"]["traces"], "num_traces": self.problems, "seed": PROBLEM_SEED}
            evaluate = EvaluateConfig(max_new_tokens=200, batch_size=self.problems)
            score(model, EvaluateStageConfig(model="", problems=TraceConfig(**traces), evaluate=evaluate), out)
        return json.loads((out / "summary.json").read_text())["accuracy"]

    def untrained(self) -> dict[str, tuple[float, float, float]]:
        """Score, held-out KL and CE of the unpruned model, and of cuts of several sizes made at once and left so."""
        config = self.config(0, *ARMS[REFERENCE])
        models = {"unpruned": config.prune.model}
        for share in dict.fromkeys([*self.shares, config.prune.neuron_sparsity]):
            out = self.scratch / f"pruned-{share}"
            if not Checkpoint(out).is_finished:
                prune.run(replace(config.prune, neuron_sparsity=share), out, how=How(resume=True))
            models[f"{share:.1%} of the neurons pruned, not trained"] = str(out)
        found = {}
        for name, model in models.items():
            losses = train.measure(config.distill, model)
            accuracy = self.accuracy(model, self.scratch / Path(model).name)
            found[name] = (accuracy, losses["validation_kd"] or 0.0, losses["validation_ce"] or 0.0)
        return found


def table_of(found: dict[str, list[dict[str, Any]]], untrained: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """One row an arm, and its numbers by name."""
    rows: list[list[str]] = []
    keys: dict[str, Any] = {}
    for name, (accuracy, kl, ce) in untrained.items():
        rows.append([name, shown((accuracy, math.nan, math.nan), 3), "", f"{kl:.4f}", "", f"{ce:.4f}", "", "", ""])
        keys[name] = {"accuracy": accuracy, "kl": kl, "ce": ce}
    for name, runs in found.items():
        pairs = list(zip(runs, found[REFERENCE], strict=True))
        means = {key: interval([run[key] for run in runs]) for key in ("accuracy", "kl", "ce")}
        differences = {
            f"{key}_difference": interval([run[key] - other[key] for run, other in pairs]) for key in ("accuracy", "kl")
        }
        cost = {key: statistics.fmean(run[key] for run in runs) for key in COSTS}
        rows.append(
            [
                name,
                shown(means["accuracy"], 3),
                shown(differences["accuracy_difference"], 3),
                shown(means["kl"], 4),
                shown(differences["kl_difference"], 4),
                shown(means["ce"], 4),
                f"{cost['tokens']:,.0f}",
                f"{cost['flops'] / 1e12:.2f}",
                f"{cost['seconds']:.0f}",
            ]
        )
        keys[name] = {**means, **differences, **cost}
    difference = f"minus {REFERENCE}"
    columns = ["model", "score (95 %)", difference, "held-out KL (95 %)", difference, "held-out CE (95 %)"]
    return markdown([*columns, "tokens", "TFLOP", "seconds"], rows), keys


def shown(value: Sequence[float], digits: int) -> str:
    """A mean and its interval, as far as there are any."""
    mean, low, high = ("-" if math.isnan(number) else f"{number:.{digits}f}" for number in value)
    return mean if low == "-" else f"{mean} ({low} to {high})"


def finite(value: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 traces, one seed: shows that it runs, nothing else")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1, help="passes over the traces, all rounds together")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help=f"some of them, {REFERENCE!r} too")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--problems", type=int, default=100, help="to score; 0 leaves the score out")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES, help="further cuts shown without training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where runs are kept; a temporary directory by default")
    parser.add_argument("--out", type=Path, help="directory for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header = conditions(options.threads, ("torch", "transformers"))
    with tempfile.TemporaryDirectory() as temporary:
        study = Study(options.scratch or Path(temporary), options)
        seeds = range(1 if options.quick else options.seeds)
        runs = {(name, seed): study.run(name, seed) for seed in seeds for name in options.arms}
        found = {name: [runs[name, seed] for seed in seeds] for name in options.arms}
        table, keys = table_of(found, study.untrained())
    name = "recovery" if options.recipe == RECIPE else f"recovery_{options.recipe.stem}"
    name = name if options.epochs == 1 else f"{name}_{options.epochs}_epochs"
    publish(name, __doc__, header, table, finite(keys), finite(found), options.out)


if __name__ == "__main__":
    main()
