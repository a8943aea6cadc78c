"""A group's parameters in the forms that a step needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from limbeck.errors import ConfigError
from limbeck.optim.noise import NoiseKey, parameter_id
from limbeck.optim.sharding import Layout, layout, local, local_like

Draw = tuple[NoiseKey, Layout]
"""The key of a parameter's noise, and where its local part lies."""


class Traits(NamedTuple):
    """What does not change between the steps of a group, found once."""

    num_params: int
    is_plain: bool
    """All parameters are whole, real tensors, so that their local parts are themselves."""
    numels: list[int]
    """Real numbers in each logical parameter."""


@dataclass(slots=True, eq=False)
class Block:
    """The parameters of one group that have a gradient, in the forms that a step needs."""

    group: dict[str, Any]
    traits: Traits
    positions: list[Any]
    """Of its parameters, among all parameters of the optimizer."""
    params: list[Tensor]
    """As handed to the optimizer: DTensor, complex ..."""
    values: list[Tensor]
    """What the step changes: local, real; masters where there are any."""
    grads: list[Tensor]
    """Local, real, not negated."""
    numel: int
    """Real numbers in the logical parameters."""

    def draws(self, step: int) -> list[Draw]:
        """What the noise of each parameter depends on at `step`."""
        group, names = self.group, self.positions
        if "param_names" in group:
            known = {id(p): name for p, name in zip(group["params"], group["param_names"], strict=True)}
            names = [known[id(p)] for p in self.params]
        return [
            (NoiseKey(group["seed"], step, parameter_id(name)), layout(param))
            for name, param in zip(names, self.params, strict=True)
        ]


def gather(groups: list[dict[str, Any]], known: dict[int, Traits]) -> list[Block]:
    """A block for every group.

    Args:
      known: what earlier calls found out about the groups; kept by the caller, filled here.
    Raises: ConfigError for sparse gradients.
    """
    blocks, first = [], 0
    for i, group in enumerate(groups):
        if i not in known or known[i].num_params != len(group["params"]):
            known[i] = _traits(group["params"])
        blocks.append(_block(group, known[i], first))
        first += len(group["params"])
    return blocks


def _traits(params: list[Tensor]) -> Traits:
    numels = [p.numel() * (2 if p.is_complex() else 1) for p in params]
    return Traits(len(params), not any(isinstance(p, DTensor) or p.is_complex() for p in params), numels)


def _block(group: dict[str, Any], traits: Traits, first: int) -> Block:
    positions, params, grads, numel = [], [], [], 0
    for i, param in enumerate(group["params"]):
        grad = param.grad
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            raise ConfigError(
                f"a gradient of layout {grad.layout} cannot be perturbed as a whole; use sparse=False in the embedding."
            )
        positions.append(first + i)
        params.append(param)
        grads.append(grad)
        numel += traits.numels[i]
    if traits.is_plain:
        return Block(group, traits, positions, params, list(params), grads, numel)
    grads = [local_like(grad, param) for grad, param in zip(grads, params, strict=True)]
    return Block(group, traits, positions, params, [local(p.detach()) for p in params], grads, numel)
