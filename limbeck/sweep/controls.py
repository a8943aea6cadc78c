"""What a cut has to be compared with: whole traces at its cost, which is known before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from limbeck.cost.hardware import DEVICES
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import UNCUT
from limbeck.distill.predict import predict_distill
from limbeck.models.load import load_tokenizer
from limbeck.sweep.plan import PlannedRun, is_uncut, naming, reference_of, tokenizer_name

SAME_COST = 0.02
"""Cuts of the same uncut run whose costs differ by less than this share have one control together."""


def with_controls(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs, and behind them whole traces at the cost of every cut.

    Raises: ConfigError, naming the run, when no supervised token is left in one.
    """
    controls: list[tuple[PlannedRun, Cost]] = []
    for run in runs:
        if is_uncut(run.config):
            continue
        with naming(run):
            tokenizer = load_tokenizer(tokenizer_name(run.config))
            cost = cost_of(run.config, tokenizer)
            config = whole_at_cost(run.config, cost, tokenizer)
        reference = reference_of(run, list(runs))
        twin = next((n for n, other in enumerate(controls) if _is_twin(other, config, cost)), None)
        if twin is not None:
            other, paid = controls[twin]
            controls[twin] = other._replace(control_of=(*other.control_of, run.name)), paid
            continue
        axes = (reference or run).axes
        controls.append((PlannedRun(f"whole-at-the-cost-of-{run.name}", axes, config, (run.name,)), cost))
    return [*runs, *(control for control, _ in controls)]


def _is_twin(other: tuple[PlannedRun, Cost], config: DistillConfig, cost: Cost) -> bool:
    """Whether a control serves another cut too: nothing but the number of tokens differs, and that hardly."""
    control, paid = other
    training = replace(config.training, max_tokens=control.config.training.max_tokens)
    is_same_run = replace(config, training=training) == control.config
    return is_same_run and abs(cost.flops - paid.flops) < SAME_COST * paid.flops


class Cost(NamedTuple):
    """What a run will train on, to the last FLOP of its ledger."""

    tokens: int
    flops: int
    """Of student and head; the teacher's pass is paid once for all runs of a sweep."""


def cost_of(config: DistillConfig, tokenizer: Any) -> Cost:
    """Tokens and FLOPs of a run before it runs."""
    found = predict_distill(config, tokenizer=tokenizer, hardware=DEVICES["laptop-cpu"])
    return Cost(found.tokens, found.flops["student"] + found.flops["head"])


def whole_at_cost(config: DistillConfig, cost: Cost, tokenizer: Any) -> DistillConfig:
    """The same run on whole traces, over fewer of them, at the FLOPs of a cut.

    Args:
      config: the cut, or the whole run; what it does not cut stays.
      cost: that of the cut.
      tokenizer: of the student.
    Returns: a config whose `max_tokens` is as many whole-trace tokens as those FLOPs pay, to within one step.
    """
    whole = replace(config, truncation=UNCUT)
    full = cost_of(whole, tokenizer)
    tokens = max(1, round(full.tokens * cost.flops / full.flops))
    return replace(whole, training=replace(whole.training, max_tokens=tokens, max_steps=None))
