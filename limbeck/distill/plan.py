"""Which examples make up each step: a pure function of the lengths and the seed, so a resumed run sees the same order.

1. Examples are shuffled, seeded by (seed, epoch).
2. Within windows of `bucket_batches` batches they are sorted by length, so that a batch holds like with like.
   Of several sources an epoch reads what `mix` says instead of all examples.
3. Windows are cut into batches of `batch_size` sequences, or under `batch_tokens` tokens; the batches are shuffled.
   Batches that grow are cut, in order and without the sorting, from an endless row of shuffled epochs instead.
4. A batch is dealt to the ranks, longest first to the emptiest, and each rank's share is cut into micro-batches under
   `microbatch_tokens` tokens, each for one teacher. Micro-batches bound the memory; they do not change the gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from limbeck.distill.mix import Mix
from limbeck.errors import ConfigError
from limbeck.optim.growing_batch import BatchGrowth
from limbeck.traces.batch import Layout


class PlannedStep(NamedTuple):
    """One optimizer step."""

    microbatches: tuple[tuple[tuple[int, ...], ...], ...]
    """[rank][micro-batch] -> indices of examples. A rank may have none."""

    @property
    def indices(self) -> tuple[int, ...]:
        """All examples of the step, over the ranks."""
        return tuple(index for rank in self.microbatches for group in rank for index in group)


def plan_steps(
    lengths: Sequence[int],
    *,
    epochs: float,
    batch_size: int | None,
    batch_tokens: int | None,
    microbatch_tokens: int,
    layout: Layout,
    bucket_batches: int,
    seed: int,
    max_steps: int | None = None,
    max_tokens: int | None = None,
    world_size: int = 1,
    growth: BatchGrowth | None = None,
    mix: Mix | None = None,
    teachers: Sequence[int] | None = None,
) -> list[PlannedStep]:
    """All steps of a run.

    Args:
      lengths: tokens of each example.
      epochs: passes over the examples; the last may be partial. Ignored in favour of whichever limit comes first below.
      batch_size: sequences a step; or None, with `batch_tokens`: tokens a step.
      microbatch_tokens: most tokens in one forward pass (padding included when padded); a longer sequence goes alone.
      layout: packed or padded, which decides what a micro-batch costs.
      bucket_batches: batches a window that is sorted by length; 1 leaves the order fully random.
      max_steps, max_tokens: stop after so many; when one is given, epochs repeat until it is reached.
      world_size: number of ranks.
      growth: size of the batch at each step, in sequences or tokens as the batch is; `bucket_batches` is not used.
      mix: what an epoch reads of several sources; None: every example once.
      teachers: number of the teacher of each example; None: all have one.
    Raises: ConfigError when there is no example.
    """
    if not lengths:
        raise ConfigError("no trace is left to train on.")
    if growth is None:
        batches = _fixed_batches(lengths, mix, batch_size, batch_tokens, bucket_batches, seed)
    else:
        batches = _growing_batches(lengths, mix, growth, batch_tokens is not None, seed)
    if max_steps is None and max_tokens is None:
        batches = _first_sequences(batches, max(1, round(epochs * (mix.size if mix else len(lengths)))))
    if max_tokens is not None:
        batches = _first_tokens(batches, lengths, max_tokens)
    return [
        split_step(batch, lengths, microbatch_tokens, layout, world_size, teachers)
        for batch in itertools.islice(batches, max_steps)
    ]


def _first_sequences(batches: Iterator[list[int]], count: int) -> Iterator[list[int]]:
    """The batches with the first `count` sequences; the last may be smaller."""
    while count > 0:
        batch = next(batches)[:count]
        count -= len(batch)
        yield batch


def _first_tokens(batches: Iterator[list[int]], lengths: Sequence[int], count: int) -> Iterator[list[int]]:
    """Whole batches until they have `count` tokens."""
    while count > 0:
        batch = next(batches)
        count -= sum(lengths[index] for index in batch)
        yield batch


def _fixed_batches(
    lengths: Sequence[int],
    mix: Mix | None,
    batch_size: int | None,
    batch_tokens: int | None,
    bucket_batches: int,
    seed: int,
) -> Iterator[list[int]]:
    for epoch in itertools.count():
        rng = np.random.default_rng((seed, epoch))
        order = _shuffled(lengths, mix, seed, epoch, rng)
        yield from _epoch_batches(order, lengths, batch_size, batch_tokens, bucket_batches, rng)


def _shuffled(lengths: Sequence[int], mix: Mix | None, seed: int, epoch: int, rng: np.random.Generator) -> list[int]:
    """The examples of an epoch in its order."""
    members = np.arange(len(lengths)) if mix is None else mix.epoch(epoch, seed)
    return [int(i) for i in members[rng.permutation(len(members))]]


def _growing_batches(
    lengths: Sequence[int], mix: Mix | None, growth: BatchGrowth, counts_tokens: bool, seed: int
) -> Iterator[list[int]]:
    row = itertools.chain.from_iterable(
        _shuffled(lengths, mix, seed, epoch, np.random.default_rng((seed, epoch))) for epoch in itertools.count()
    )
    pending = next(row)
    for step in itertools.count():
        batch, filled = [pending], lengths[pending] if counts_tokens else 1
        pending = next(row)
        while filled + (cost := lengths[pending] if counts_tokens else 1) <= growth.size_at(step):
            batch.append(pending)
            filled += cost
            pending = next(row)
        yield batch


def _epoch_batches(
    order: Sequence[int],
    lengths: Sequence[int],
    batch_size: int | None,
    batch_tokens: int | None,
    bucket_batches: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    mean_length = max(1.0, float(np.mean([lengths[index] for index in order])))
    per_batch = batch_size if batch_size is not None else max(1, int((batch_tokens or 1) / mean_length))
    window = max(1, per_batch * bucket_batches)
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        members = list(order[start : start + window])
        if bucket_batches > 1:
            members.sort(key=lambda index: lengths[index])
        batches.extend(_cut_batches(members, lengths, batch_size, batch_tokens))
    return [batches[i] for i in rng.permutation(len(batches))] if bucket_batches > 1 else batches


def _cut_batches(
    members: Sequence[int], lengths: Sequence[int], batch_size: int | None, batch_tokens: int | None
) -> Iterator[list[int]]:
    if batch_size is not None:
        yield from (list(members[i : i + batch_size]) for i in range(0, len(members), batch_size))
        return
    batch: list[int] = []
    total = 0
    for index in members:
        if batch and total + lengths[index] > (batch_tokens or 0):
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += lengths[index]
    if batch:
        yield batch


def split_step(
    batch: Sequence[int],
    lengths: Sequence[int],
    microbatch_tokens: int,
    layout: Layout,
    world_size: int,
    teachers: Sequence[int] | None = None,
) -> PlannedStep:
    """Deal the examples of one batch to the ranks and cut each share into micro-batches; arguments as above."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for index in sorted(batch, key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    return PlannedStep(
        tuple(
            tuple(
                group
                for taught in _by_teacher(share, teachers)
                for group in _cut_microbatches(taught, lengths, microbatch_tokens, layout)
            )
            for share in shares
        )
    )


def _by_teacher(share: Sequence[int], teachers: Sequence[int] | None) -> Iterator[list[int]]:
    """The examples of each teacher, in their order."""
    if teachers is None:
        yield list(share)
        return
    for teacher in sorted({teachers[index] for index in share}):
        yield [index for index in share if teachers[index] == teacher]


def _cut_microbatches(
    share: Sequence[int], lengths: Sequence[int], microbatch_tokens: int, layout: Layout
) -> Iterator[tuple[int, ...]]:
    group: list[int] = []
    for index in share:
        candidate = [*group, index]
        cost = (
            sum(lengths[i] for i in candidate)
            if layout == "packed"
            else len(candidate) * max(lengths[i] for i in candidate)
        )
        if group and cost > microbatch_tokens:
            yield tuple(group)
            candidate = [index]
        group = candidate
    if group:
        yield tuple(group)
