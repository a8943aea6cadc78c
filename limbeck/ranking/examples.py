"""Encoded requests as examples of the distillation loop: one pair each, weight on its label token only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from limbeck.distill.config import TrainingConfig
from limbeck.distill.plan import PlannedStep, plan_steps
from limbeck.ranking.featurize import EncodedRequest, Labels
from limbeck.traces.batch import Example
from limbeck.traces.sample import ANSWER, PROMPT, Sample


def pair_examples(request: EncodedRequest, labels: Labels) -> list[Example]:
    """The pairs of a request with their label tokens; `trace_key` says that they belong together."""
    return [_example(request, index, labels) for index in range(len(request.candidates))]


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


def _example(request: EncodedRequest, index: int, labels: Labels) -> Example:
    answer = labels.yes if request.labels[index] else labels.no
    input_ids = np.append(request.pair(index), answer).astype(np.int32)
    weight = np.zeros(len(input_ids), dtype=np.float32)
    weight[-1] = 1.0
    segment_ids = np.full(len(input_ids), PROMPT, dtype=np.int8)
    segment_ids[-1] = ANSWER
    sample = Sample(
        input_ids=input_ids,
        segment_ids=segment_ids,
        ending_start=len(input_ids) - 1,
        trace_key=request.request_id,
    )
    return Example(sample=sample, ce_weight=weight, kd_weight=weight)
