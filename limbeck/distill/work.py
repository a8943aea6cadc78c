"""What one optimizer step trains on: given traces, or rollouts, in the form that the loop reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from limbeck.distill.config import DistillConfig, LossConfig
from limbeck.distill.objective import Totals, step_totals
from limbeck.distill.plan import Step, split_step
from limbeck.distill.rollouts import Rollouts
from limbeck.traces.batch import Example


class Work(NamedTuple):
    """One rank's part of a step, with the denominators of the whole."""

    microbatches: list[list[Example]]
    totals: Totals
    loss: LossConfig
    kd_ratio: float
    metrics: dict[str, Any]
    """Further columns of the step's line in metrics.jsonl."""

    @property
    def has_loss(self) -> bool:
        """Whether the step supervises anything; one that does not must leave weights and moments alone on all ranks."""
        return (self.kd_ratio < 1 and self.totals.ce > 0) or (self.kd_ratio > 0 and self.totals.kd > 0)


def given_work(
    config: DistillConfig, examples: Sequence[Example], step: Step, reader: int, in_step: bool = False
) -> Work:
    """The given traces of `step`; `in_step` fills up with empty micro-batches to as many as any reader has."""
    return Work(
        _microbatches(examples, step, reader, in_step),
        step_totals([examples[i] for i in step.indices], config.loss.normalization),
        config.loss,
        config.kd_ratio,
        {} if config.on_policy is None else {"on_policy": 0.0},
    )


def rollout_work(
    config: DistillConfig, rollouts: Rollouts, number: int, reader: int, readers: int, in_step: bool = False
) -> Work:
    """The rollouts of step `number`: KD only, dealt to ranks and micro-batches by their own lengths."""
    examples, training = rollouts.examples_of(number), config.training
    lengths = [len(example) for example in examples]
    step = split_step(range(len(examples)), lengths, training.microbatch_tokens, training.layout, readers)
    return Work(
        _microbatches(examples, step, reader, in_step),
        step_totals(examples, config.loss.normalization),
        replace(config.loss, divergence=rollouts.config.divergence or config.loss.divergence),
        1.0,
        {"on_policy": 1.0, **rollouts.metrics(number)},
    )


def _microbatches(examples: Sequence[Example], step: Step, reader: int, in_step: bool) -> list[list[Example]]:
    own = [[examples[i] for i in group] for group in step.microbatches[reader]]
    missing = max(map(len, step.microbatches)) - len(own) if in_step else 0
    return own + [[]] * missing
