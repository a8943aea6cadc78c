"""What a step is logged by: its losses, tokens and gradient norm, read when they have come from the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.distill.parallel import Ranks, sum_numbers
from limbeck.ledger import event_on


class StepNumbers(NamedTuple):
    """Of one step, over all processes."""

    ce: float
    kd: float
    tokens: int
    """Read so far."""
    is_ending: bool
    """Whether any process was asked to end."""
    norm: float
    """Of the gradient before it was clipped."""


class Pending:
    """The numbers of a step on their way: on a CPU they are there at once, from a device when it has got so far."""

    def __init__(
        self, ranks: Ranks, losses: Sequence[tuple[Tensor, Tensor]], tokens: int, is_ending: bool, norm: Tensor
    ) -> None:
        """All processes call.

        Args:
          losses: CE and KD part of each micro-batch.
          tokens: read so far by this process.
          is_ending: whether this process was asked to end.
          norm: of the gradient.
        """
        self._event = event_on(ranks.device)
        if ranks.device.type == "cpu":
            both = [sum((float(pair[term]) for pair in losses), 0.0) for term in range(2)]
            numbers = sum_numbers([*both, tokens, is_ending], ranks)
            self._host = torch.tensor([*numbers, float(norm)], dtype=torch.float64)
            return
        zero = torch.zeros((), dtype=torch.float64, device=ranks.device)
        ce, kd = (torch.stack([zero, *(pair[term] for pair in losses)]).sum() for term in range(2))
        sums = torch.stack([ce, kd, zero + tokens, zero + is_ending])
        if ranks.world_size > 1:
            sums = sums * ranks.is_counted
            dist.all_reduce(sums)
        self._host = torch.empty(5, dtype=torch.float64, pin_memory=torch.version.cuda is not None)
        self._host.copy_(torch.cat([sums, norm.double().reshape(1).to(ranks.device)]), non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> StepNumbers:
        """The numbers; a device is waited for until it is through with the step."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        ce, kd, tokens, is_ending, norm = self._host.tolist()
        return StepNumbers(ce, kd, int(tokens), bool(is_ending), norm)
