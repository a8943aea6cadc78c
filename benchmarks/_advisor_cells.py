"""The 24 regimes that the cut advisor is fitted and tested on, and their students, trained one by one and kept.

Traces (lengths alike or spread; the answer derived early, in the middle or at the end; another task) x how much the
student knows x learning rate. Arms: the student before training (`base`), whole traces, half of all tokens by one
common length (`common`), half of each trace (`share`); one epoch of CE + KD, a seed is the order of the traces. Each
arm is a line of a JSONL file; what is there is not trained again, so a call that was stopped goes on.

Half of the regimes fit the advisor's rule and half test it, told apart by their place in the grid as the colours of a
chessboard: every kind of traces, every skill and every rate is in both halves, no combination is in both.

`_cells.py` trains regimes of `builtin:recheck` and `builtin:chain`; these are smaller, since there are 240 students,
and the number of re-checks is what is varied, so that a student of the chains knows all but that.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limbeck.config import build
from limbeck.distill import train
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import prepare
from limbeck.engine.complete import complete
from limbeck.engine.sampling import SamplingConfig
from limbeck.models.load import load_model, load_tokenizer
from limbeck.stage import How
from limbeck.teacher.build import write_cache
from limbeck.teacher.cache import CacheConfig
from limbeck.teacher.shard import Stored
from limbeck.traces.render import RenderConfig, render_prompt, stop_ids
from limbeck.traces.synthetic import DERIVATION_PATTERN, draw_problem, make_trace
from limbeck.traces.trace import Trace, write_jsonl

NUM_TRACES, NUM_PROBLEMS, BATCH = 640, 160, 8
"""At 160 problems and 3 seeds the difference of two arms is known to about 0.03, so that a regime whose whole traces
gain 0.3 knows its gain kept to 0.1; one that gains 0.15, to 0.2."""
HELD_OUT = slice(480, 640)
"""Which of the problems of a kind are held out."""
RATES = (3e-4, 1e-3)
ONCE = (1, 1)
RENDER = RenderConfig(derivation_pattern=DERIVATION_PATTERN)
BASE, WHOLE, COMMON, SHARE = "base", "whole", "common", "share"


class Kind(NamedTuple):
    """Chains of `steps` steps; the answer is derived, and checked as often as `checks` says, drawn for each trace."""

    steps: tuple[int, int]
    checks: tuple[int, int] = ONCE
    operators: str = "+-*"


KINDS = {
    "lengths alike": Kind((3, 4)),
    "lengths spread by steps": Kind((1, 6)),
    "lengths spread by re-checks": Kind((3, 3), (0, 3)),
    "derived early": Kind((3, 3), (2, 2)),
    "derived at the end": Kind((4, 5), (0, 0)),
    "multiplication": Kind((2, 5), operators="*"),
}
SKILLS = {"novice": (0, 15), "capable": (50, 30)}
"""Steps of 16 whole traces, at a rate of 1.5e-3, between `tiny-student`, which knows chains that are checked once, and
the student of a regime: where traces are checked once, and where they are not."""


class Cell(NamedTuple):
    """One regime of the grid."""

    kind: str
    skill: str
    rate: float
    half: str
    """fit or test."""

    @property
    def name(self) -> str:
        """What rows are found by."""
        return f"{self.kind}; {self.skill}; {self.rate:g}"


CELLS = [
    Cell(kind, skill, rate, ("fit", "test")[(i + j + k) % 2])
    for i, kind in enumerate(KINDS)
    for j, skill in enumerate(SKILLS)
    for k, rate in enumerate(RATES)
]


def make_traces(kind: Kind, count: int, seed: int, without: Container[str] = ()) -> list[Trace]:
    """Distinct problems with their worked solutions, none of which has a prompt of `without`."""
    rng = random.Random(seed)
    traces: dict[str, Trace] = {}
    while len(traces) < count:
        trace = make_trace(*draw_problem(rng, rng.randint(*kind.steps), kind.operators))
        derived, check = (trace.cot or "").split("\nCheck")
        if kind.checks != ONCE:
            check += f"\nSo {trace.answer}"  # so that the answer is never far from where it is copied to
        cot = derived + ("\nCheck" + check) * rng.randint(*kind.checks)
        if trace.prompt_key not in without:
            traces.setdefault(trace.prompt_key, replace(trace, cot=cot))
    return list(traces.values())


def split(name: str) -> tuple[list[Trace], list[Trace]]:
    """Training traces and held-out problems of a kind."""
    made = make_traces(KINDS[name], NUM_TRACES + NUM_PROBLEMS, 11)
    return made[: HELD_OUT.start] + made[HELD_OUT.stop :], made[HELD_OUT]


def others(name: str, count: int, seed: int) -> list[Trace]:
    """Traces of a kind without its held-out problems: what its base and its teacher learn from."""
    return make_traces(KINDS[name], count, seed, {trace.prompt_key for trace in split(name)[1]})


class Bench:
    """The models and files of the regimes in a directory, each made when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory

    def config(self, cell: Cell, **fields: Any) -> DistillConfig:
        """The run of a regime on whole traces, its teacher live."""
        number = list(KINDS).index(cell.kind)
        start, steps = "tiny-student", SKILLS[cell.skill][KINDS[cell.kind].checks != ONCE]
        if steps:
            start = self._trained(start, f"base-{number}-{cell.skill}", cell.kind, 77, steps, 1.5e-3)
        teacher = "tiny-teacher"
        if KINDS[cell.kind].checks != ONCE:
            teacher = self._trained(teacher, f"teacher-{number}", cell.kind, 12, 40, 8e-4)
        traces = self._file(f"{number}.jsonl", lambda: split(cell.kind)[0])
        return build(DistillConfig, recipe(start, traces, cell.rate, teacher={"model": teacher}, **fields))

    def arm(self, cell: Cell, arm: str, seed: int) -> dict[str, Any]:
        """Train one arm of a regime, score it, and leave nothing but the figures."""
        start, config = time.perf_counter(), self.config(cell)
        problems = split(cell.kind)[1]
        if arm == BASE:
            return score(str(config.student.model), problems)
        cut = {WHOLE: {}, COMMON: {"policy": "common_length"}, SHARE: {}}[arm]
        fields = {"truncation": {**cut, "lead_fraction": 1.0 if arm == WHOLE else 0.5}}
        config = replace(
            self.config(cell, **fields),
            teacher=replace(config.teacher, model=None, cache=self._cache(cell, config)),
            training=replace(config.training, seed=seed),
        )
        out = self.directory / f"{CELLS.index(cell)}-{arm}-{seed}"
        cost = train.run(config, out, how=How(overwrite=True)).cost
        figures = score(str(out), problems)
        shutil.rmtree(out)
        return {**figures, "flops": cost["flops"]["total"], "seconds": round(time.perf_counter() - start, 1)}

    def _cache(self, cell: Cell, config: DistillConfig) -> Path:
        """What the teacher says of the whole traces."""
        out = self.directory / f"cache-{list(KINDS).index(cell.kind)}"
        examples = prepare(config, load_tokenizer("tiny-student")).train
        stored = [Stored(example.sample.input_ids, example.kd_weight > 0) for example in examples]
        if not (out / "checksums.txt").exists():
            write_cache(str(config.teacher.model), CacheConfig(top_k=32), stored, out, config)
        return out

    def _file(self, name: str, make: Callable[[], list[Trace]]) -> Path:
        path = self.directory / name
        if not path.exists():
            write_jsonl(make(), path)
        return path

    def _trained(self, start: str, name: str, kind: str, seed: int, steps: int, rate: float) -> str:
        out = self.directory / name
        if not (out / "limbeck.json").exists():
            traces = self._file(f"{name}.jsonl", lambda: others(kind, 16 * steps, seed))
            tree = recipe(start, traces, rate)
            tree["training"] |= {"batch_size": 16}
            train.run(build(DistillConfig, tree), out, how=How(overwrite=True))
        return str(out)


def recipe(student: str, traces: Path, rate: float, **fields: Any) -> dict[str, Any]:
    """A distillation as all models here are trained."""
    return {
        "student": {"model": student},
        "traces": {"source": str(traces)},
        "num_validation": 0,
        "render": {"derivation_pattern": DERIVATION_PATTERN},
        "training": {"batch_size": BATCH, "num_threads": 1, "save_every_steps": 0},
        "optimizer": {"learning_rate": rate, "beta2": 0.98},
        "schedule": {"warmup_fraction": 0.05},
        **fields,
    }


def score(model: str, problems: Sequence[Trace]) -> dict[str, float]:
    """Share of right answers, and what it is made of: derived right, answer = what was derived, stopped."""
    tokenizer = load_tokenizer(model)
    prompts = [render_prompt(tokenizer, problem.messages, RENDER) for problem in problems]
    sampling = SamplingConfig(max_new_tokens=260, batch_size=len(prompts))
    written = complete(load_model(model), prompts, sampling, stop_ids(tokenizer, RENDER))
    rows = []
    for problem, (completion,) in zip(problems, written, strict=True):
        thought, _, answer = tokenizer.decode(completion.text_ids).partition("</think>")
        found = re.search(r"So (\d)", thought)
        derived, answer = found.group(1) if found else "", answer.strip() if completion.stopped else ""
        rows.append((answer == problem.reference, derived == problem.reference, answer == derived, completion.stopped))
    names = ("score", "derivation_right", "answer_as_derived", "stop_rate")
    return dict(zip(names, np.mean(rows, axis=0).round(4).tolist(), strict=True))


def work() -> Iterator[tuple[Cell, str, int]]:
    """All arms of all regimes, what is needed most first."""
    yield from ((cell, BASE, 0) for cell in CELLS if cell.rate == RATES[0])
    both, alone = (WHOLE, COMMON), (SHARE,)
    for seed, arms in ((0, both), (0, alone), (1, both), (2, both), (1, alone), (2, alone)):
        yield from ((cell, arm, seed) for cell in CELLS for arm in arms)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The lines that are there."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def train_rows(wanted: Sequence[tuple[Cell, str, int]], bench: Bench, file: Path, seconds: float = 1e9) -> bool:
    """Train what the file does not have, as far as the time goes; returns whether all is there."""
    end = time.monotonic() + seconds
    for cell, arm, seed in wanted:
        if any((row["cell"], row["arm"], row["seed"]) == (cell.name, arm, seed) for row in read_rows(file)):
            continue
        if time.monotonic() > end:
            return False
        row = {"cell": cell.name, "arm": arm, "seed": seed, **bench.arm(cell, arm, seed)}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
    return True
