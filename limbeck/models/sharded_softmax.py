"""What a loss asks of rows of logits, for a vocabulary that is all here or shared out over a group of processes.

A process with V / n rows of the head sees V / n of every row of logits. Everything that the loss needs of a whole row
is a log-sum-exp, a sum, or the logits of a few entries; each is found in every part and added up:

    log-sum-exp       log sum_r exp(lse_r)        one number a row from each process
    sums              sum_r sum_(v in part r)     values of divergences, and their gradients' sums
    chosen entries    from the part that has them

so that the loss is that of whole rows, exact but for the order of sums. All processes of the group must see the same
rows (`distill.gathered`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from limbeck.models.anatomy import Head
from limbeck.models.sharded import whole_tensor

# torch 2.13 gave it a new name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Softmax:
    """The whole vocabulary is here."""

    def entries(self, vocab: int) -> int:
        """Entries that are here, of a vocabulary of `vocab`."""
        return vocab

    @property
    def largest(self) -> int | None:
        """Entries of the largest part, from which all processes derive the same chunks; None where there is one."""
        return None

    def log_softmax(self, logits: Tensor) -> Tensor:
        """[n V] of [n V]."""
        return torch.log_softmax(logits, -1)

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        """[n 1], over the vocabulary."""
        return torch.logsumexp(logits, -1, keepdim=True)

    def sum(self, parts: Tensor) -> Tensor:
        """Sums over the vocabulary from those over the entries that are here."""
        return parts

    def gather(self, logits: Tensor, ids: Tensor) -> Tensor:
        """[n K]: the entries `ids` [n K] of each row."""
        return logits.gather(1, ids)

    def scatter_add_(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        """Add `values` [n K] to the entries `ids` of each row."""
        logits.scatter_add_(1, ids, values)

    def exclude_(self, logits: Tensor, ids: Tensor) -> None:
        """Set the entries `ids` of each row to -inf."""
        logits.scatter_(1, ids, -torch.inf)


WHOLE = Softmax()


@dataclass(frozen=True, slots=True)
class ShardedSoftmax(Softmax):
    """The entries `start` to `stop` are here, the others with the other processes of `group`."""

    group: dist.ProcessGroup
    start: int
    stop: int
    head_rows: int
    """Rows of the whole head, padding included."""

    def entries(self, vocab: int) -> int:
        return self.stop - self.start

    @property
    def largest(self) -> int:
        return -(-self.head_rows // self.group.size())

    def log_softmax(self, logits: Tensor) -> Tensor:
        return logits - self.log_sum_exp(logits)

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        own = torch.logsumexp(logits, -1, keepdim=True)
        return torch.logsumexp(gather_parts(own[None], self.group), 0)

    def sum(self, parts: Tensor) -> Tensor:
        total = parts.contiguous()
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, logits: Tensor, ids: Tensor) -> Tensor:
        places, here = self._places(ids)
        found = logits.gather(1, places) if logits.shape[1] else logits.new_zeros(ids.shape)
        return self.sum(found.masked_fill(~here, 0.0))

    def scatter_add_(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        places, here = self._places(ids)
        if logits.shape[1]:
            logits.scatter_add_(1, places, values.masked_fill(~here, 0.0))

    def exclude_(self, logits: Tensor, ids: Tensor) -> None:
        places, here = self._places(ids)
        if logits.shape[1]:
            logits.scatter_reduce_(1, places, torch.where(here, -torch.inf, torch.inf).to(logits.dtype), "amin")

    def _places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of `ids` in this part, clamped, and which of them are here."""
        here = (ids >= self.start) & (ids < self.stop)
        return (ids - self.start).clamp(0, max(0, self.stop - self.start - 1)), here


def part_of(weight: Tensor, vocab: int) -> ShardedSoftmax | None:
    """The part of a vocabulary of `vocab` entries whose head rows this process holds; None when it holds all."""
    if not isinstance(weight, DTensor):
        return None
    group = weight.device_mesh.get_group("shard")
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    start = min(offset[0], vocab)
    return ShardedSoftmax(group, start, min(start + shape[0], vocab), len(weight))


def head_rows(head: Head, part: ShardedSoftmax) -> Head:
    """The rows of a head that belong to `part`, with gradients for what trains."""
    return Head(_rows(head.weight, part), None if head.bias is None else _rows(head.bias, part), head.softcap)


def gather_parts(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of all processes, equal in size, behind one another."""
    whole = part.new_empty(group.size() * len(part), *part.shape[1:])
    _all_gather(whole, part, group=group)
    return whole


def _rows(tensor: Tensor, part: ShardedSoftmax) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor[part.start : part.stop]
    ranks, theirs = (dist.get_process_group_ranks(g) for g in (part.group, tensor.device_mesh.get_group("shard")))
    if ranks == theirs and len(tensor) == part.head_rows:
        return _OwnRows.apply(tensor)
    # Of a teacher that is cut otherwise than the student.
    return whole_tensor(tensor.detach())[part.start : part.stop]


class _OwnRows(torch.autograd.Function):
    """The rows that are here; their gradient is complete, but for the copies of the model that saw other rows."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.layout = (tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())
        return tensor.to_local()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_rows: Tensor) -> DTensor:
        mesh, placements, shape, stride = ctx.layout
        if "replicate" in mesh.mesh_dim_names:
            dist.all_reduce(by_rows, group=mesh.get_group("replicate"))
        return DTensor.from_local(by_rows, mesh, placements, run_check=False, shape=shape, stride=stride)
