"""Encoded requests as examples of the distillation loop: one pair each, weight on its label token only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limbeck.distill.config import TrainingConfig
from limbeck.distill.plan import PlannedStep, plan_steps
from limbeck.ranking.featurize import EncodedRequest, Labels
from limbeck.traces.batch import Example
from limbeck.traces.sample import ANSWER, PROMPT, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(Example):
    """A pair, with what is known of it beside its tokens."""

    grade: float
    """How relevant the candidate is."""
    log_odds: float
    """Of a scorer to distil from; NaN where there is none."""


def grades_of(examples: Sequence[Example]) -> Tensor:
    """float32 [N] of pairs."""
    return torch.tensor([example.grade for example in examples if isinstance(example, Pair)])


def log_odds_of(examples: Sequence[Example]) -> Tensor:
    """float32 [N] of pairs."""
    return torch.tensor([example.log_odds for example in examples if isinstance(example, Pair)])


def pair_examples(request: EncodedRequest, labels: Labels, by_scores: bool = False) -> list[Pair]:
    """The pairs of a request with their label tokens; `trace_key` says that they belong together.

    Args:
      by_scores: whether KD is of scores that stand with the pairs; a pair without one then has no KD term.
    """
    return [_example(request, index, labels, by_scores) for index in range(len(request.candidates))]


def plan_requests(
    requests: Sequence[EncodedRequest], training: TrainingConfig, world_size: int = 1
) -> list[PlannedStep]:
    """Steps over whole requests: batch sizes count requests, and no micro-batch or rank has part of one.

    Returns: steps of indices into all pairs, request after request.
    """
    sizes = [len(request.candidates) for request in requests]
    starts = np.cumsum(sizes) - sizes
    steps = plan_steps(
        [_tokens(request) for request in requests],
        epochs=training.epochs,
        batch_size=training.batch_size,
        batch_tokens=training.batch_tokens,
        microbatch_tokens=training.microbatch_tokens,
        layout="packed",
        bucket_batches=training.bucket_batches,
        seed=training.seed,
        max_steps=training.max_steps,
        max_tokens=training.max_tokens,
        world_size=world_size,
        growth=training.growing_batch(),
    )

    def pairs(group: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(starts[i]) + n for i in group for n in range(sizes[i]))

    return [PlannedStep(tuple(tuple(map(pairs, rank)) for rank in step.microbatches)) for step in steps]


def _tokens(request: EncodedRequest) -> int:
    """Tokens of all pairs, label tokens included."""
    return sum(len(request.prefix) + len(candidate) + 1 for candidate in request.candidates)


def _example(request: EncodedRequest, index: int, labels: Labels, by_scores: bool) -> Pair:
    answer = labels.yes if request.labels[index] else labels.no
    input_ids = np.append(request.pair(index), answer).astype(np.int32)
    log_odds = float("nan" if request.teacher is None else request.teacher[index])
    ce_weight, kd_weight = np.zeros((2, len(input_ids)), dtype=np.float32)
    ce_weight[-1] = 1.0 if request.weights is None else request.weights[index]
    kd_weight[-1] = 0.0 if by_scores and np.isnan(log_odds) else 1.0
    segment_ids = np.full(len(input_ids), PROMPT, dtype=np.int8)
    segment_ids[-1] = ANSWER
    sample = Sample(
        input_ids=input_ids,
        segment_ids=segment_ids,
        ending_start=len(input_ids) - 1,
        trace_key=request.request_id,
    )
    return Pair(
        sample=sample,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        grade=float(request.labels[index] if request.grades is None else request.grades[index]),
        log_odds=log_odds,
    )
