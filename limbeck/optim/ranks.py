"""The cross gate's estimate from data-parallel ranks."""

# No postponed annotations: DistributedDataParallel compares those of the hook with the classes themselves.
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from limbeck.errors import ConfigError


class RankSquares:
    """The cross gate from data-parallel ranks instead of half-batches, with DistributedDataParallel.

        ranks = RankSquares()
        ddp_model.register_comm_hook(ranks, RankSquares.hook)
        loss.backward();  optimizer.observe(ranks.estimate(ddp_model.parameters()));  optimizer.step()

    With K ranks,  (K ||mean g||^2 - mean ||g_k||^2) / (K - 1)  is the average of <g_j, g_k> over pairs of ranks.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self._local: list[Tensor] = []
        self._passes = 0

    def hook(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Note the squared norm of this rank's gradients, then average them as DDP does by default."""
        self._passes += bucket.is_last()
        self._local.append(bucket.buffer().double().square().sum())
        return allreduce_hook(self.process_group or dist.group.WORLD, bucket)  # type: ignore[arg-type]

    def estimate(self, params: Any) -> Tensor:
        """The estimate of ||grad f||^2 for `optimizer.observe`, the same on every rank; forgets the noted norms.

        Raises: ConfigError with fewer than two ranks, and where the gradients of none or of several backward passes
          were noted since the last call.
        """
        ranks = dist.get_world_size(self.process_group)
        if ranks < 2:
            raise ConfigError(
                "RankSquares: compares the gradients of ranks and needs two at least; this job has one. Use "
                "observe_half() after each of two half-batches, or gate='norm'."
            )
        if not self._local:
            raise ConfigError(
                "RankSquares: no gradients were noted since the last estimate. Register it on the "
                "DistributedDataParallel model, register_comm_hook(ranks, RankSquares.hook), and call backward()."
            )
        squares, passes = torch.stack(self._local).sum(), self._passes
        self._local, self._passes = [], 0
        if passes > 1:
            raise ConfigError(
                f"RankSquares: {passes} backward passes were averaged over the ranks since the last estimate, whose "
                "norms do not add up. Accumulate under no_sync(), and call estimate() once a step."
            )
        dist.all_reduce(squares, group=self.process_group)
        mean_square = torch.stack([p.grad.double().square().sum() for p in params if p.grad is not None]).sum()
        return (ranks * mean_square - squares / ranks) / (ranks - 1)
