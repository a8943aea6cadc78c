"""What one optimizer step trains on: given traces, or rollouts, in the form that the loop reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from limbeck.distill.microbatch import StepLoss, step_totals
from limbeck.distill.plan import PlannedStep, split_step
from limbeck.distill.rollouts import Rollouts
from limbeck.distill.setup import Run
from limbeck.traces.batch import Example
from limbeck.traces.supervise import TokenSelection


class StepWork(NamedTuple):
    """One rank's part of a step, with the loss of the whole."""

    microbatches: list[list[Example]]
    loss: StepLoss
    metrics: dict[str, Any]
    """Further columns of the step's line in metrics.jsonl."""


def work_of(run: Run, number: int) -> StepWork:
    """The given traces of step `number` or, when it is due, what the student writes."""
    if run.rollouts is None or not run.rollouts.is_due(number):
        return _given(run, number)
    run.rollouts.refresh(number, run.student.model, run.student.sizes, run.ledger, run.ranks)
    return _written(run, run.rollouts, number)


def _given(run: Run, number: int) -> StepWork:
    examples, config, step = run.data.train, run.config, run.steps[number]
    metrics: dict[str, Any] = {} if run.rollouts is None else {"on_policy": 0.0}
    if run.data.moving is not None:
        share = 0.0
        if run.stop_control is not None:
            metrics |= run.stop_control.look(number, run.student.model, run.student.sizes, run.ledger, run.ranks)
            share = run.stop_control.share
        examples = run.data.moving.examples(number, len(run.steps), step.indices, share)
        step = _dealt(run, examples)
    totals = step_totals([examples[i] for i in step.indices], config.loss.normalization)
    loss = StepLoss(config.loss, config.kd_ratio, totals, _selection(run, number), run.borders)
    return StepWork(_microbatches(run, examples, step), loss, metrics)


def _written(run: Run, rollouts: Rollouts, number: int) -> StepWork:
    """The rollouts of step `number`: KD only."""
    examples, config = rollouts.examples_of(number), run.config
    step = _dealt(run, examples)
    terms = replace(config.loss, divergence=rollouts.config.divergence or config.loss.divergence)
    loss = StepLoss(terms, 1.0, step_totals(examples, config.loss.normalization), _selection(run, number))
    return StepWork(_microbatches(run, examples, step), loss, {"on_policy": 1.0, **rollouts.metrics(number)})


def _selection(run: Run, number: int) -> TokenSelection | None:
    """What a step selects by; random draws are others in every step."""
    select = run.select
    return None if select is None else replace(select, seed=select.seed * 1_000_003 + number)


def _dealt(run: Run, examples: Sequence[Example]) -> PlannedStep:
    """A step of these examples, dealt by their lengths."""
    lengths, training = [len(example) for example in examples], run.config.training
    return split_step(range(len(examples)), lengths, training.microbatch_tokens, training.layout, run.ranks.readers)


def _microbatches(run: Run, examples: Sequence[Example], step: PlannedStep) -> list[list[Example]]:
    """This process's; filled up with empty ones to as many as any process has where all must keep step."""
    own = [[examples[i] for i in group] for group in step.microbatches[run.ranks.reader]]
    missing = max(map(len, step.microbatches)) - len(own) if run.in_step else 0
    return own + [[]] * missing
