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
    numel: int
    """Real numbers in all of its logical parameters."""


@dataclass(slots=True, eq=False)
class Block:
    """The parameters of one group that have a gradient, in the forms that a step needs."""

    group: dict[str, Any]
    traits: Traits
    positions: list[int]
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
        group, names = self.group, list[Any](self.positions)
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
        blocks.append(_block(group, _traits(i, group["params"], known), first))
        first += len(group["params"])
    return blocks


def plain_grads(index: int, params: list[Tensor], known: dict[int, Traits]) -> list[Tensor] | None:
    """The gradients of a group whose parameters are all whole and real and have a dense gradient; None for others."""
    if not params or not _traits(index, params, known).is_plain:
        return None
    grads = [param.grad for param in params]
    for grad in grads:
        if grad is None or grad.layout is not torch.strided:
            return None
    return grads  # type: ignore[return-value]


def _traits(index: int, params: list[Tensor], known: dict[int, Traits]) -> Traits:
    if index not in known or known[index].num_params != len(params):
        is_plain = not any(isinstance(p, DTensor) or p.is_complex() for p in params)
        known[index] = Traits(len(params), is_plain, sum(real_numel(p) for p in params))
    return known[index]


def _block(group: dict[str, Any], traits: Traits, first: int) -> Block:
    kept = [i for i, param in enumerate(group["params"]) if _is_dense(param.grad)]
    params = [group["params"][i] for i in kept]
    grads = [local_like(param.grad, param) for param in params]
    values = list(params) if traits.is_plain else [local(p.detach()) for p in params]
    numel = traits.numel if len(params) == traits.num_params else sum(real_numel(param) for param in params)
    return Block(group, traits, [first + i for i in kept], params, values, grads, numel)


def _is_dense(grad: Tensor | None) -> bool:
    if grad is None:
        return False
    if grad.layout is not torch.strided:
        raise ConfigError(
            f"a gradient of layout {grad.layout} cannot be perturbed as a whole; use sparse=False in the embedding."
        )
    return True


def real_numel(param: Tensor) -> int:
    """Real numbers in a parameter."""
    return param.numel() * (2 if param.is_complex() else 1)
