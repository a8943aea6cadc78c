"""One student a cell: the map of cuts over regimes, trained a cell at a time and kept in one file of lines.

A regime says who learns from what: student, how much it was trained on whole traces beforehand, task, number of steps,
redundancy and spread of the traces, number of traces, learning rate. An arm says what is kept of the traces: fields of
`DistillConfig` by path, or one of these:

    {"common_length": 0.5}              one length for all traces, so that this share of all tokens is kept
    {"equal_cost": {...another arm}}    whole traces at the FLOPs of another arm
    {"completed": {...a cut}}           traces cut so and finished by the base student, the first "traces.num_traces"
    {"untrained": true}                 the base student as it is

    from _cells import Regime, train_cells
    train_cells([(Regime(spread=0.4), "lead 0.5", {"lead_fraction": 0.5}, seed) for seed in range(3)], scratch, store)

A line of the store has `regime`, `arm`, `changes`, `seed`; `score`, `derivation_right`, `answer_as_derived`,
`stop_rate`, `output_tokens`, `validation_ce`; `right`, one digit a problem in their order, for paired intervals; `base`
(the base student's score) and `base_right`; `flops` (student and head), `tokens`, `peak_bytes`, `train_seconds`. A cell
that is in the store is not trained again.

    python benchmarks/_cells.py --regime '{"spread": 0.4}' --arm '{"lead_fraction": 0.5}' --seeds 3
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.checkpoint import Checkpoint
from limbeck.config import build, checked, to_dict
from limbeck.distill.commands import DISTILL
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import prepare
from limbeck.evaluate.commands import COMPLETE, EVALUATE
from limbeck.evaluate.cut_and_complete import CompleteConfig
from limbeck.evaluate.run import EvaluateConfig
from limbeck.evaluate.stage import EvaluateStageConfig
from limbeck.flags import set_field
from limbeck.models.load import load_tokenizer
from limbeck.stage import go_on
from limbeck.sweep.controls import cost_of, whole_at_cost
from limbeck.teacher.build import write_cache
from limbeck.teacher.cache import CacheConfig
from limbeck.teacher.shard import Stored
from limbeck.traces.sources import TraceConfig, read_traces
from limbeck.traces.synthetic import DERIVATION_PATTERN
from limbeck.traces.trace import write_jsonl

STORE = Path(__file__).parent / "results" / "cut_cells.jsonl"
Cell = tuple["Regime", str, Mapping[str, Any], int]
"""Regime, name of the arm, its changes, seed."""
TOP_K, TOP_P = 32, 0.95


@checked
class Regime:
    """Who learns from what."""

    student: str = "tiny-recheck-student"
    """Where the base student comes from: a built-in name or a directory."""
    warmup_steps: int = 0
    """Steps on whole traces of this regime, other problems, that make the base student of it."""
    teacher: str = "tiny-recheck-teacher"
    """The teacher, or what it is made of."""
    teacher_steps: int = 0
    """Steps on whole traces of this regime that make the teacher; 0 leaves it as it is."""
    task: str = "recheck"
    """recheck or chain."""
    min_steps: int = 4
    max_steps: int = 5
    redundancy: float = 0.8
    """Of recheck."""
    spread: float = 0.8
    """Of recheck."""
    num_traces: int = 1500
    num_problems: int = 300
    learning_rate: float = 3e-4
    kd_ratio: float = 0.5
    epochs: float = 1.0
    temperature: float = 1.0
    """Of the sampling that is scored; top-p is 0.95."""


class Bench:
    """The files of a regime: traces, problems, base student, teacher, what the teacher says."""

    def __init__(self, regime: Regime, scratch: Path) -> None:
        self.regime = regime
        self.root = scratch / "data" / _digest({"data": self._source(0, 0)})
        self.problems = self._made("problems", 900_001, regime.num_problems)
        self.student = self._trained(regime.student, regime.warmup_steps, 500_001)
        self.teacher = self._trained(regime.teacher, regime.teacher_steps, 700_001)
        self.tokenizer = load_tokenizer(self.student)

    def _source(self, seed: int, count: int) -> dict[str, Any]:
        regime = self.regime
        common: dict[str, Any] = {"source": f"builtin:{regime.task}", "num_traces": count, "seed": seed}
        if regime.task == "chain":
            return common | {"chain_min_steps": regime.min_steps, "chain_max_steps": regime.max_steps}
        lengths = {"redundancy": regime.redundancy, "spread": regime.spread}
        return common | {"recheck": lengths | {"fewest_steps": regime.min_steps, "most_steps": regime.max_steps}}

    def _made(self, name: str, seed: int, count: int) -> Path:
        """Traces of the task as a file; none of them has a prompt of the problems."""
        file = self.root / f"{name}-{count}.jsonl"
        if not file.exists():
            made, _ = read_traces(build(TraceConfig, self._source(seed, count)))
            problems, _ = read_traces(build(TraceConfig, self._source(900_001, self.regime.num_problems)))
            taken = {trace.prompt_key for trace in problems} if name != "problems" else set()
            write_jsonl([trace for trace in made if trace.prompt_key not in taken], file)
        return file

    def _trained(self, model: str, steps: int, seed: int) -> str:
        """A model after some steps on whole traces of this regime."""
        if not steps:
            return model
        tree = {
            "student": {"model": model},
            "traces": {"source": str(self._made(f"warm-up-{seed}", seed, 16 * steps))},
            "num_validation": 0,
            "training": {"max_steps": steps, "batch_size": 16, "save_every_steps": 0},
            "optimizer": {"learning_rate": 1e-3, "beta2": 0.98},
            "schedule": {"warmup_fraction": 0.05},
        }
        out = self.root / f"{_digest(tree)}-{steps}"
        go_on(DISTILL, build(DistillConfig, tree), out)
        return str(out)

    def _completed(self, cut: Mapping[str, Any], count: int | None) -> Path:
        """The first traces, cut, and finished by the base student."""
        tree: dict[str, Any] = {
            "student": self.student,
            "traces": {"source": str(self._made("traces", 1, self.regime.num_traces)), "num_traces": count},
            "sampling": {"max_new_tokens": 640, "temperature": self.regime.temperature},
            "checker": "exact",
        }
        for path, value in cut.items():
            set_field(CompleteConfig, tree, path, value, flag=path)
        out = self.root / f"completed-{_digest(tree)}"
        go_on(COMPLETE, build(CompleteConfig, tree), out)
        return out

    def config(self, changes: Mapping[str, Any], seed: int) -> DistillConfig:
        """The run of an arm, its teacher live."""
        regime = self.regime
        tree: dict[str, Any] = {
            "student": {"model": self.student},
            "teacher": {"model": self.teacher},
            "traces": {"source": str(self._made("traces", 1, regime.num_traces))},
            "num_validation": 64,
            "render": {"derivation_pattern": DERIVATION_PATTERN},
            "loss": {"kd_ratio": regime.kd_ratio},
            "training": {"epochs": regime.epochs, "batch_size": 16, "seed": seed, "save_every_steps": 0},
            "optimizer": {"learning_rate": regime.learning_rate, "beta2": 0.98},
            "schedule": {"warmup_fraction": 0.05},
        }
        special = {"common_length", "equal_cost", "untrained", "completed"}
        for path, value in changes.items():
            if path not in special:
                set_field(DistillConfig, tree, path, value, flag=path)
        if "completed" in changes:
            tree["traces"]["source"] = str(
                self._completed(changes["completed"], tree["traces"].pop("num_traces", None))
            )
        if "common_length" in changes:
            lengths = [len(example) for example in prepare(build(DistillConfig, tree), self.tokenizer).train]
            tree["truncation"] = {"policy": "budget", "budget_tokens": common_length(lengths, changes["common_length"])}
        config = build(DistillConfig, tree)
        if "equal_cost" in changes:
            other = cost_of(self.config(changes["equal_cost"], seed), self.tokenizer)
            config = whole_at_cost(config, other, self.tokenizer)
        return config

    def stored(self, config: DistillConfig) -> DistillConfig:
        """The run with what the teacher says read from a cache, which is filled as far as this run needs it."""
        if config.kd_ratio == 0 or config.on_policy is not None:
            return config
        data = prepare(config, self.tokenizer)
        asked = [Stored(example.sample.input_ids, example.kd_weight > 0) for example in data.train]
        place = self.root / f"cache-{_digest(self.teacher)}"
        write_cache(self.teacher, CacheConfig(top_k=TOP_K), asked, place, config)
        tree = to_dict(config)
        tree["teacher"] |= {"model": None, "cache": str(place)}
        return build(DistillConfig, tree)

    def scoring(self, model: str) -> EvaluateStageConfig:
        """How a student is scored."""
        return build(
            EvaluateStageConfig,
            {
                "model": model,
                "problems": {"source": str(self.problems)},
                "evaluate": to_dict(
                    EvaluateConfig(max_new_tokens=900, batch_size=300, temperature=self.regime.temperature, top_p=TOP_P)
                ),
                "render": {"derivation_pattern": DERIVATION_PATTERN},
            },
        )

    def scored(self, model: str, out: Path) -> dict[str, Any]:
        """The score of a student and what it is made of."""
        found = go_on(EVALUATE, self.scoring(model), out).metrics
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        names = ("derivation_right", "answer_as_derived", "stop_rate", "output_tokens")
        right = "".join(str(int(row["verdicts"][0] == "right")) for row in rows)
        return {"score": found["accuracy"], **{name: found[name] for name in names}, "right": right}


def common_length(lengths: Iterable[int], share: float) -> int:
    """The length N at which the first N tokens of every trace are `share` of all tokens, or as near as may be below."""
    ordered = np.sort(np.fromiter(lengths, dtype=np.int64))
    kept = np.array([np.minimum(ordered, n).sum() for n in range(1, ordered[-1] + 1)])
    return max(1, int(np.searchsorted(kept, share * ordered.sum(), side="right")))


@cache
def bench_of(regime: Regime, scratch: Path) -> Bench:
    """The files of a regime, made once a process."""
    return Bench(regime, scratch)


def train_cell(cell: Cell, scratch: Path) -> dict[str, Any]:
    """Train and score one student; returns its line of the store."""
    regime, arm, changes, seed = cell
    with _locked(scratch):
        bench = bench_of(regime, scratch)
        base = bench.scored(bench.student, bench.root / f"base-{_digest(to_dict(bench.scoring(bench.student)))}")
        config = None if changes.get("untrained") else bench.stored(bench.config(changes, seed))
    line: dict[str, Any] = {"regime": to_dict(regime), "arm": arm, "changes": dict(changes), "seed": seed}
    line |= {"base": base["score"], "base_right": base["right"]}
    if config is None:
        return line | base | {"flops": 0, "tokens": 0, "peak_bytes": 0, "train_seconds": 0.0, "validation_ce": None}
    out = scratch / "cells" / key_of(line)
    go_on(DISTILL, config, out)
    manifest = Checkpoint(out).manifest
    ledger = manifest["ledger"]
    return (
        line
        | bench.scored(str(out), out / "evaluation")
        | {
            "flops": ledger["flops"]["student"] + ledger["flops"]["head"],
            "flops_teacher": ledger["flops"]["teacher"],
            "flops_sampling": ledger["flops"]["sampling"],
            "tokens": ledger["tokens"],
            "peak_bytes": ledger["peak_bytes"]["total"],
            "train_seconds": ledger["train_seconds"],
            "validation_ce": manifest["metrics"]["validation_ce"],
        }
    )


def key_of(line: Mapping[str, Any]) -> str:
    """What names a cell: regime, changes and seed; not the arm's name. Fields that Regime got later are defaults."""
    return _digest([to_dict(build(Regime, line["regime"])), line["changes"], line["seed"]])


def read_cells(store: Path = STORE) -> list[dict[str, Any]]:
    """All lines of the store."""
    return [json.loads(line) for line in store.read_text(encoding="utf-8").splitlines()] if store.exists() else []


def train_cells(cells: Iterable[Cell], scratch: Path, store: Path = STORE) -> list[dict[str, Any]]:
    """The lines of all cells; those that are not in the store are trained and added to it, one by one."""
    known, found = {key_of(line): line for line in read_cells(store)}, []
    for cell in cells:
        regime, _, changes, seed = cell
        key = key_of({"regime": to_dict(regime), "changes": dict(changes), "seed": seed})
        if key not in known:
            known[key] = train_cell(cell, scratch)
            _append(store, known[key])
        found.append(known[key])
    return found


@contextmanager
def _locked(scratch: Path) -> Iterator[None]:
    """One process at a time makes what several cells share."""
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _append(store: Path, line: Mapping[str, Any]) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line) + "\n")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regime", type=json.loads, default={}, help="fields of Regime as JSON")
    parser.add_argument("--arm", type=json.loads, action="append", required=True, help="changes as JSON; repeatable")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=Path("runs/cells"))
    parser.add_argument("--store", type=Path, default=STORE)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    regime = build(Regime, options.regime)
    cells = [(regime, json.dumps(arm), arm, seed) for arm in options.arm for seed in range(options.seeds)]
    for line in train_cells(cells, options.scratch, options.store):
        print(json.dumps({name: value for name, value in line.items() if not name.endswith("right") or "_" in name}))


if __name__ == "__main__":
    main()
