"""Data parallelism under torchrun: every rank holds the model, and gradients are summed.

Losses are already divided by the totals of the whole step, so a sum over ranks is the gradient of one process.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from limbeck.ledger import COUNTS, Ledger


class Ranks(NamedTuple):
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0


def join() -> Ranks:
    """Join the group that torchrun set up, or be alone."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(int(os.environ.get("RANK", "0")), world_size, device)


def sum_gradients(model: nn.Module, world_size: int) -> None:
    """Replace every gradient by its sum over the ranks, in one message; a missing one counts as zero."""
    if world_size == 1:
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in trainable if parameter.grad is not None])
    dist.all_reduce(flat)
    offset = 0
    for parameter in trainable:
        assert parameter.grad is not None
        parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()


def sum_numbers(values: list[float], ranks: Ranks) -> list[float]:
    """Sums over the ranks of a few numbers."""
    if ranks.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def total_cost(ledger: Ledger, ranks: Ranks) -> dict[str, Any]:
    """The ledger's plain values over all ranks: counts and FLOPs summed, peaks the largest, seconds of this rank."""
    cost = ledger.as_dict()
    if ranks.world_size == 1:
        return cost
    parts: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(parts, cost)
    for name in COUNTS:
        cost[name] = sum(part[name] for part in parts)
    for name in cost["flops"]:
        cost["flops"][name] = sum(part["flops"][name] for part in parts)
    for part in parts:
        for name, value in part["peak_bytes"].items():
            cost["peak_bytes"][name] = max(cost["peak_bytes"].get(name, 0), value)
    return cost


def wait(ranks: Ranks) -> None:
    """Wait for all ranks."""
    if ranks.world_size > 1:
        dist.barrier()
