"""Descent with momentum, as `torch.optim.SGD` does it: what the Langevin family adds its noise to."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import ConfigError
from limbeck.optim.block import Block
from limbeck.optim.gated import GatedOptimizer
from limbeck.optim.gates import Vector
from limbeck.optim.injected import Joint
from limbeck.optim.settings import LOW_PRECISION
from limbeck.optim.sharding import local


class Descent(GatedOptimizer):
    """The parts of a step that goes down; settings as in `torch.optim.SGD`, weight decay decoupled."""

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ConfigError(f"{type(self).__name__}: nesterov needs a momentum and no dampening.")

    def _directions(self, block: Block) -> list[Tensor]:
        """u_t: the gradient, or its momentum buffer, which only gradients enter."""
        group = block.group
        grads = torch._foreach_neg(block.grads) if group["maximize"] and block.grads else block.grads
        if group["momentum"] == 0 or not block.params:
            return list(grads)
        buffers, old, fresh = [], [], []
        for param, grad in zip(block.params, grads, strict=True):
            state = self.state[param]
            was_there = self._has_buffer(state, group)
            if was_there:
                old.append(local(state["momentum_buffer"]))
                fresh.append(grad)
            else:
                # The first buffer is the gradient itself, undampened, as in torch.optim.SGD.
                assert param.grad is not None
                state["momentum_buffer"] = param.grad.detach().clone()
                local(state["momentum_buffer"]).copy_(grad)
            if group["gate"] == "ema":
                self._weigh(state, group, grad, was_there)
            buffers.append(local(state["momentum_buffer"]))
        scale_(old, group["momentum"], group["foreach"])
        add_(old, fresh, 1 - group["dampening"], group["foreach"])
        return list(torch._foreach_add(grads, buffers, alpha=group["momentum"])) if group["nesterov"] else buffers

    def _weigh(self, state: dict[str, Any], group: dict[str, Any], grad: Tensor, was_there: bool) -> None:
        """Note how many gradients a momentum buffer holds, for the gate "ema"."""
        # A buffer without a note is another optimizer's, or of an older version: it has run for long.
        before = state.get("momentum_weight", 1 / (1 - group["momentum"]) if was_there else 0.0)
        # Where nothing is stepped, a gradient of zeros is the one by which a checkpoint makes this state.
        counts = not self._is_frozen() or bool(grad.any())
        state["momentum_weight"] = group["momentum"] * before + 1.0 if counts else before

    def _has_buffer(self, state: dict[str, Any], group: dict[str, Any]) -> bool:
        if "momentum_buffer" not in state:
            return False
        # A distributed checkpoint makes buffers of zeros before the first step, which must not dampen it.
        is_first = group["dampening"] != 0 and group["noise_step"] == 0
        return not is_first or bool(local(state["momentum_buffer"]).any())

    def _descend(self, block: Block, directions: list[Tensor], boost: float | Tensor, is_noisy: bool) -> Joint | None:
        """x <- (1 - lr weight_decay) x - lr psi u, or a Joint of what is summed with its noise first."""
        group = block.group
        lr = float(group["lr"])
        decay = 1 - lr * group["weight_decay"]
        rate = lr * boost
        values, pushes = block.values, directions
        is_joint = is_noisy and group["low_precision"] == "stochastic" and any(v.dtype in LOW_PRECISION for v in values)
        if is_joint:
            kept = [j for j, value in enumerate(block.values) if value.dtype not in LOW_PRECISION]
            values, pushes = [block.values[j] for j in kept], [directions[j] for j in kept]
        scale_(values, decay, group["foreach"])
        add_(values, pushes, -rate, group["foreach"])
        return Joint(directions, rate, decay) if is_joint else None

    def _finish(self, block: Block) -> None:
        group = block.group
        if group["reset_momentum"] and group["momentum"] != 0 and float(group["lr"]) != 0:
            keep = (group["last_fire"] != group["noise_step"] - 1) * 1.0
            for param in block.params:
                state = self.state[param]
                local(state["momentum_buffer"]).mul_(keep)
                if "momentum_weight" in state:
                    state["momentum_weight"] = state["momentum_weight"] * keep
        self._round_masters(block)

    def _averages(self, blocks: list[Block]) -> list[Vector]:
        """The momentum buffers, bias-corrected, where there are any: no second buffer is kept."""
        if any(b.group["momentum"] == 0 or b.group["dampening"] != 0 for b in blocks):
            return super()._averages(blocks)
        return [
            Vector([param], [local(state["momentum_buffer"])], 1 / state["momentum_weight"])
            for block in blocks
            for param in block.params
            for state in [self.state[param]]
        ]


def scale_(tensors: list[Tensor], factor: float, foreach: bool | None) -> None:
    if factor == 1.0:
        return
    (together,), (alone,) = _parted(foreach, tensors)
    if together:
        torch._foreach_mul_(together, factor)
    for tensor in alone:
        tensor.mul_(factor)


def add_(tensors: list[Tensor], others: list[Tensor], alpha: float | Tensor, foreach: bool | None) -> None:
    if isinstance(alpha, Tensor):
        if tensors:
            torch._foreach_add_(tensors, torch._foreach_mul(others, alpha))
        return
    together, alone = _parted(foreach, tensors, others)
    if together[0]:
        torch._foreach_add_(*together, alpha=alpha)
    for tensor, other in zip(*alone, strict=True):
        tensor.add_(other, alpha=alpha)


def _parted(foreach: bool | None, *lists: list[Tensor]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """What is stepped in one call, and what tensor by tensor; each as many lists as were given."""
    # torch's multi-tensor product rounds a factor to the tensors' own type, so that low precision on the CPU needs the
    # loop, as torch.optim.SGD chooses there.
    alone = [
        foreach is False or (foreach is None and tensor.dtype in LOW_PRECISION and tensor.device.type == "cpu")
        for tensor in lists[0]
    ]
    together = [not is_alone for is_alone in alone]
    return [list(compress(tensors, together)) for tensors in lists], [list(compress(t, alone)) for t in lists]
