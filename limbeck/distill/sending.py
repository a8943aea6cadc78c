"""A micro-batch on its way to an accelerator: all that a step reads is made on the host and goes over in one copy.

What a device would have to be asked for (which rows are supervised, which terms there are, where sequences end, which
tokens can be left out) is known to the host when it lays a batch out, so that nobody waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.distill.rows import SupervisedRows, Terms
from limbeck.models.anatomy import Given
from limbeck.models.lean import PackedPlan
from limbeck.models.lean_device import DevicePlan, plan_on_host
from limbeck.models.varlen import Cuts
from limbeck.teacher.cache import TeacherCache
from limbeck.teacher.several import Teacher
from limbeck.teacher.targets import TeacherTargets
from limbeck.traces.batch import Batch, Example

ALIGNMENT = 16
"""Bytes: kernels read that much at once."""


class Sent(NamedTuple):
    """What is known of a micro-batch that is on its device."""

    supervised: SupervisedRows
    """The positions that have a term."""
    terms: Terms
    """Which terms they have."""
    given: Given
    """For their hidden states."""
    targets: TeacherTargets | None
    """Theirs, where they were read from a cache."""


class Laid(NamedTuple):
    """The same on the host."""

    batch: Batch
    sent: Sent

    def send(self, device: torch.device) -> tuple[Batch, Sent]:
        """The batch and what is known of it on the device, without waiting for it."""
        batch, (supervised, terms, given, targets) = self
        plan = given.plan
        tensors = [batch.input_ids, batch.positions, batch.ce_weight, batch.kd_weight, *supervised[:3]]
        tensors += [] if given.cuts is None else [given.cuts.starts]
        tensors += [] if plan is None else [plan.plan.kept, plan.plan.rows, plan.cuts.starts]
        there = iter(copied(tensors, device))
        moved = replace(
            batch, input_ids=next(there), positions=next(there), ce_weight=next(there), kd_weight=next(there)
        )
        supervised = SupervisedRows(next(there), next(there), next(there), None)
        cuts = None if given.cuts is None else Cuts(next(there), given.cuts.longest)
        if plan is not None:
            kept, rows = next(there), next(there)
            packed = PackedPlan(kept, plan.plan.lengths, plan.plan.prefix, rows)
            plan = DevicePlan(packed, Cuts(next(there), plan.cuts.longest))
        if targets is not None:
            targets = targets.map_rows(lambda tensor: copied([tensor], device)[0])
        return moved, Sent(supervised, terms, Given(cuts, plan), targets)


def lay_out(batch: Batch, supervised: SupervisedRows, examples: Sequence[Example], teacher: Teacher | None) -> Laid:
    """All that is known of a micro-batch on the host.

    Args:
      batch: on the host.
      supervised: of all its targets.
      teacher: one that reads from a cache is asked now.
    """
    supervised, _ = supervised.used()
    terms, given = Terms.of(supervised.ce_coef, supervised.kd_coef), Given()
    if batch.layout == "packed":
        cuts, plan = Cuts.of(batch.sequence_lengths, batch.input_ids.device), None
        if len(supervised.rows):
            plan = plan_on_host(batch.input_ids[0], batch.sequence_lengths, supervised.rows - 1)
        given = Given(cuts, plan)
    targets = None
    if isinstance(teacher, TeacherCache) and terms.kd:
        targets = teacher.look_up(batch, examples, supervised.rows)
    return Laid(batch, Sent(supervised, terms, given, targets))


def copied(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host on an accelerator, by one copy out of page-locked memory that nobody waits for."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    # Only a build for CUDA has page-locked memory.
    buffer = torch.empty(places[-1], dtype=torch.uint8, pin_memory=torch.version.cuda is not None)
    for tensor, place, size in zip(tensors, places, sizes, strict=False):
        buffer[place : place + size].copy_(tensor.contiguous().view(-1).view(torch.uint8))
    there = buffer.to(device, non_blocking=True)
    return [
        there[place : place + size].view(tensor.dtype).view(tensor.shape)
        for tensor, place, size in zip(tensors, places, sizes, strict=False)
    ]
