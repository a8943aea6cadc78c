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


class StepWork(NamedTuple):
    """One rank's part of a step, with the loss of the whole."""

    microbatches: list[list[Example]]
    loss: StepLoss
    metrics: dict[str, Any]
    """Further columns of the step's line in metrics.jsonl."""


def work_of(run: Run, number: int) -> StepWork:
    """The given traces of step `number` or, when it is due, what the student writes."""
    if run.rollouts is None or not run.rollouts.is_due(number):
        return _given(run, run.steps[number])
    run.rollouts.refresh(number, run.student.model, run.student.sizes, run.ledger, run.ranks)
    return _written(run, run.rollouts, number)


def _given(run: Run, step: PlannedStep) -> StepWork:
    examples, config = run.data.train, run.config
    totals = step_totals([examples[i] for i in step.indices], config.loss.normalization)
    loss = StepLoss(config.loss, config.kd_ratio, totals, run.select)
    return StepWork(_microbatches(run, examples, step), loss, {} if run.rollouts is None else {"on_policy": 0.0})


def _written(run: Run, rollouts: Rollouts, number: int) -> StepWork:
    """The rollouts of step `number`: KD only, dealt to ranks and micro-batches by their own lengths."""
    examples, config = rollouts.examples_of(number), run.config
    lengths, training = [len(example) for example in examples], config.training
    step = split_step(range(len(examples)), lengths, training.microbatch_tokens, training.layout, run.ranks.readers)
    terms = replace(config.loss, divergence=rollouts.config.divergence or config.loss.divergence)
    loss = StepLoss(terms, 1.0, step_totals(examples, config.loss.normalization), run.select)
    return StepWork(_microbatches(run, examples, step), loss, {"on_policy": 1.0, **rollouts.metrics(number)})


def _microbatches(run: Run, examples: Sequence[Example], step: PlannedStep) -> list[list[Example]]:
    """This process's; filled up with empty ones to as many as any process has where all must keep step."""
    own = [[examples[i] for i in group] for group in step.microbatches[run.ranks.reader]]
    missing = max(map(len, step.microbatches)) - len(own) if run.in_step else 0
    return own + [[]] * missing
