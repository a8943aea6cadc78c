"""Processes of one run: who deals with which tokens, who holds which part of a model, and sums over all of them.

Losses are already divided by the totals of the whole step, so a sum over ranks is the gradient of one process: added up
by hand where every process holds the model (replicate), by FSDP2 where each holds a part (shard).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from limbeck.config import checked
from limbeck.cost.hardware import device_named
from limbeck.errors import ConfigError
from limbeck.ledger import COUNTS, Ledger
from limbeck.models.placement import accelerator_name, here
from limbeck.models.sharded import is_sharded
from limbeck.optim.sharding import local, sum_over_shards
from limbeck.runner.launch import Launch, launched, meet

TIMEOUT_MINUTES = 30.0
Strategy = Literal["replicate", "shard"]
"""Of a model on several processes: a copy on each, or a part on each."""


@checked
class ParallelConfig:
    """How student and live teachers lie on the processes that torchrun starts; one process alone holds all of them."""

    strategy: Strategy = "replicate"
    """replicate: every process holds the whole student; shard: each holds a part of weights, gradients and optimizer
    state, and gathers one layer at a time (FSDP2)."""
    shard_size: int | None = None
    """Processes that hold one copy of the student between them; null: all. 8 keeps the gathering inside a node."""
    teacher_strategy: Strategy | None = None
    """The same for live teachers; null: as the student."""
    teacher_shard_size: int | None = None
    """Processes that hold one copy of a teacher between them; null: all."""
    tensor_parallel_size: int = 1
    """Neighbouring processes that share the products of every layer of models in parts and read the same tokens; for
    architectures that have a plan in transformers."""
    timeout_minutes: float = TIMEOUT_MINUTES
    """How long a process waits for another before the run ends: more than loading and reading take."""
    shard_head: bool = False
    """With strategy shard: every process multiplies the rows of its group by its part of the vocabulary alone, so that
    none holds the whole head, its gradient or whole rows of logits."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "teacher_shard_size", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"parallel.{name} must be at least 1; found {value}")
        if not self.timeout_minutes > 0:
            raise ConfigError(f"parallel.timeout_minutes must be above 0; found {self.timeout_minutes}")
        if self.strategy == "replicate":
            for name, unset in (("shard_size", None), ("tensor_parallel_size", 1), ("shard_head", False)):
                if getattr(self, name) != unset:
                    raise ConfigError(f"parallel.{name} needs parallel.strategy shard")
        if self.of_teacher == "replicate" and self.teacher_shard_size is not None:
            raise ConfigError("parallel.teacher_shard_size needs parallel.teacher_strategy shard")

    @property
    def of_teacher(self) -> Strategy:
        """The strategy of live teachers in force."""
        return self.teacher_strategy or self.strategy


class Ranks(NamedTuple):
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    tensor_size: int = 1
    """Neighbours that share the products of a layer, and so read the same tokens."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    @property
    def reader(self) -> int:
        """Which share of the tokens this process reads."""
        return self.rank // self.tensor_size

    @property
    def readers(self) -> int:
        """Shares that the tokens of a step are dealt into."""
        return self.world_size // self.tensor_size

    @property
    def is_counted(self) -> bool:
        """Whether sums over the tokens take this process in: of those that read the same, one."""
        return self.rank % self.tensor_size == 0


def join(tensor_size: int = 1, timeout_minutes: float = TIMEOUT_MINUTES) -> Ranks:
    """Join the processes that were started together (`runner.launch`), or be alone.

    Raises: ConfigError when `tensor_size` does not divide the number of processes.
    """
    launch, device = launched(), here().device
    if launch.world_size % tensor_size:
        raise ConfigError(
            f"parallel.tensor_parallel_size {tensor_size} does not divide the {launch.world_size} processes"
        )
    if launch.world_size > 1 and not dist.is_initialized():
        _meet(launch, device, timedelta(minutes=timeout_minutes))
    return Ranks(launch.rank, launch.world_size, device, tensor_size)


def _meet(launch: Launch, device: torch.device, timeout: timedelta) -> None:
    meet(launch)
    ranks: dict[str, Any] = {"rank": launch.rank, "world_size": launch.world_size, "timeout": timeout}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # What is on the host, as objects are, goes by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **ranks)
    else:
        dist.init_process_group("gloo", **ranks)


def make_mesh(ranks: Ranks, shard_size: int | None, name: str) -> DeviceMesh:
    """The processes as [replicate,] shard [, tensor]: copies of a model, parts of one, parts of each product.

    Args:
      shard_size: processes that hold one copy, beside those that share its products; None: all.
      name: of the field that says so.
    Raises: ConfigError when it does not divide the processes.
    """
    size = shard_size or ranks.readers
    if ranks.readers % size:
        raise ConfigError(f"parallel.{name} {size} does not divide the {ranks.readers} processes that read tokens")
    sizes = {"replicate": ranks.readers // size, "shard": size, "tensor": ranks.tensor_size}
    kept = {dimension: size for dimension, size in sizes.items() if size > 1 or dimension == "shard"}
    return init_device_mesh(ranks.device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))


def sum_gradients(model: nn.Module, world_size: int) -> None:
    """Replace every gradient by its sum over the ranks, in one message; a missing one counts as zero.

    Those of a model in parts are summed already.
    """
    if world_size == 1 or is_sharded(model):
        return
    gradients = []
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradients down to a norm of `limit` where theirs is larger; returns their norm before, a scalar."""
    with_grad = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not any(isinstance(parameter, DTensor) for parameter in with_grad):
        return nn.utils.clip_grad_norm_(with_grad, limit)
    grads = [local(parameter.grad) for parameter in with_grad if parameter.grad is not None]
    squares = torch.stack([grad.double().square().sum() for grad in grads])
    norm = sum_over_shards(list(with_grad), squares).sum().sqrt()
    # As torch's own: no gradient grows, and 1e-6 keeps the quotient finite.
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def skip_unless_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Let the next update be passed over on the device where the gradient's norm is not finite.

    torch's fused kernels read that flag; of other optimizers the step is made, and the run ends when its numbers are
    read, before anything of it is saved.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]


def sum_numbers(values: list[float], ranks: Ranks) -> list[float]:
    """Sums over the shares of the tokens of a few numbers."""
    if ranks.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=ranks.device) * ranks.is_counted
    dist.all_reduce(tensor)
    return tensor.tolist()


def total_cost(ledger: Ledger, ranks: Ranks) -> dict[str, Any]:
    """The ledger's plain values over all ranks: counts and FLOPs summed, peaks the largest, seconds of this rank."""
    cost = ledger.as_dict()
    if ranks.world_size == 1:
        return cost
    parts: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(parts, cost)
    counted = parts[:: ranks.tensor_size]
    for name in COUNTS:
        cost[name] = sum(part[name] for part in counted)
    for name in cost["flops"]:
        cost["flops"][name] = sum(part["flops"][name] for part in counted)
    for part in parts:
        for name, value in part["peak_bytes"].items():
            cost["peak_bytes"][name] = max(cost["peak_bytes"].get(name, 0), value)
    return cost


def throughput(cost: Mapping[str, Any], ranks: Ranks, precision: str) -> dict[str, Any]:
    """How fast a run was: processes, tokens and FLOPs a second of each, and their share of the device's peak.

    The peak is that of `cost.hardware` for products in `precision`; None where that has no such device.
    """
    seconds = max(1e-9, cost["train_seconds"]) * ranks.world_size
    rate = cost["flops"]["total"] / seconds
    peak = None
    if ranks.device.type == "cuda":
        known = device_named(accelerator_name(ranks.device))
        peak = None if known is None else known.flops[precision]
    found = {"processes": ranks.world_size, "tokens_per_second": cost["tokens"] / seconds, "flops_per_second": rate}
    return found | {"mfu": None if peak is None else rate / peak}


def wait(ranks: Ranks) -> None:
    """Wait for all ranks."""
    if ranks.world_size > 1:
        dist.barrier()
