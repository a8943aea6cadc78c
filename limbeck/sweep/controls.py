"""What a cut has to be compared with: whole traces at its cost, which is known before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from limbeck.distill.config import DistillConfig
from limbeck.distill.data import UNCUT
from limbeck.distill.predict import own_flops, step_flops
from limbeck.models.load import load_tokenizer
from limbeck.sweep.plan import PlannedRun, is_uncut, naming, reference_of, tokenizer_name

SAME_COST = 0.05
"""Cuts of the same uncut run whose controls differ by no more than this share of their steps have one together."""


def with_controls(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs, and behind them whole traces at the cost of every cut.

    Raises: ConfigError, naming the run, when no supervised token is left in one.
    """
    controls: list[PlannedRun] = []
    for run in runs:
        if is_uncut(run.config):
            continue
        with naming(run):
            tokenizer = load_tokenizer(tokenizer_name(run.config))
            config = whole_at_cost(run.config, cost_of(run.config, tokenizer), tokenizer)
        twin = next((n for n, other in enumerate(controls) if _is_same(other.config, config)), None)
        if twin is not None:
            controls[twin] = controls[twin]._replace(control_of=(*controls[twin].control_of, run.name))
            continue
        axes = (reference_of(run, list(runs)) or run).axes
        controls.append(PlannedRun(f"whole-at-the-cost-of-{run.name}", axes, config, (run.name,)))
    return [*runs, *controls]


def _is_same(control: DistillConfig, wanted: DistillConfig) -> bool:
    """Whether a control serves another cut too: nothing but the number of steps differs, and that hardly."""
    have, want = control.training.max_steps or 0, wanted.training.max_steps or 0
    like_it = replace(wanted, training=replace(wanted.training, max_steps=control.training.max_steps))
    return like_it == control and abs(have - want) <= SAME_COST * have


def cost_of(config: DistillConfig, tokenizer: Any) -> int:
    """FLOPs that a run will take, all but the teacher's, whose pass is paid once for all runs of a sweep."""
    return own_flops(config, tokenizer)


def whole_at_cost(config: DistillConfig, flops: int, tokenizer: Any) -> DistillConfig:
    """The same run on whole traces, for as many of its steps as come nearest to the FLOPs of a cut.

    Args:
      config: the cut, or the whole run; what it does not cut stays.
      flops: those of the cut, at most those of the whole run.
      tokenizer: of the student.
    """
    whole = replace(config, truncation=UNCUT, cut_schedule=None, stop_control=None)
    spent = list(accumulate(step_flops(whole, tokenizer)))
    steps = min(range(len(spent)), key=lambda number: abs(spent[number] - flops)) + 1
    return replace(whole, training=replace(whole.training, max_tokens=None, max_steps=steps))
