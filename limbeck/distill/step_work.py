"""What one optimizer step trains on: given traces, or rollouts, in the form that the loop reads.

For an accelerator a thread lays out the given traces of the next steps, and reads a cached teacher's words on them, so
that a step finds all of it on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

from limbeck.distill.config import DistillConfig
from limbeck.distill.microbatch import MicroBatch, StepLoss, step_totals
from limbeck.distill.plan import PlannedStep, split_step
from limbeck.distill.rollouts import Rollouts
from limbeck.distill.setup import Run
from limbeck.traces.batch import Example
from limbeck.traces.supervise import TokenSelection

AHEAD = 2
"""Steps that are laid out before they are asked for."""


class StepWork(NamedTuple):
    """One rank's part of a step, with the loss of the whole."""

    microbatches: list[list[Example]]
    loss: StepLoss
    metrics: dict[str, Any]
    """Further columns of the step's line in metrics.jsonl."""


class Feed:
    """The work of one step after the other, its micro-batches laid out ahead where an accelerator computes."""

    def __init__(self, run: Run) -> None:
        self._run = run
        # What asks the student comes when the step before it is done.
        asks_student = run.rollouts is not None or run.stop_control is not None
        is_ahead = run.ranks.device.type != "cpu" and not asks_student
        self._pool = ThreadPoolExecutor(1) if is_ahead else None
        self._laid: dict[int, Future[tuple[StepWork, list[Any]]]] = {}

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def take(self, number: int) -> tuple[StepWork, Iterator[MicroBatch]]:
        """What step `number` trains on, and its micro-batches on the device, one after the other."""
        run = self._run
        if self._pool is None:
            work = work_of(run, number)
            return work, (run.microbatch(examples, work.loss) for examples in work.microbatches)
        for step in range(number, min(number + 1 + AHEAD, len(run.steps))):
            if step not in self._laid:
                self._laid[step] = self._pool.submit(_laid_work, run, step)
        with run.ledger.phase("data"):
            work, laid = self._laid.pop(number).result()
        pairs = zip(laid, work.microbatches, strict=True)
        return work, (run.sent(one, examples, work.loss) for one, examples in pairs)


def _laid_work(run: Run, number: int) -> tuple[StepWork, list[Any]]:
    work = work_of(run, number)
    return work, [run.laid_out(examples, work.loss) for examples in work.microbatches]


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
    teachers = run.config.teachers_by(examples) if isinstance(run.config, DistillConfig) else None
    return split_step(
        range(len(examples)), lengths, training.microbatch_tokens, training.layout, run.ranks.readers, teachers
    )


def _microbatches(run: Run, examples: Sequence[Example], step: PlannedStep) -> list[list[Example]]:
    """This process's; filled up with empty ones to as many as any process has where all must keep step."""
    own = [[examples[i] for i in group] for group in step.microbatches[run.ranks.reader]]
    missing = max(map(len, step.microbatches)) - len(own) if run.in_step else 0
    return own + [[]] * missing
