"""A group's parameters in the forms that a step needs."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from limbeck.errors import ConfigError
from limbeck.optim.noise import NoiseKey, parameter_id
from limbeck.optim.settings import LOW_PRECISION
from limbeck.optim.sharding import Layout, layout, local, local_like

Draw = tuple[NoiseKey, Layout]
"""The key of a parameter's noise, and where its local part lies."""


class Traits(NamedTuple):
    """What does not change between the steps of a group while its parameters are the same objects of the same types."""

    params: list[Tensor]
    """The parameters that it was found for."""
    dtype: torch.dtype | None
    """Of the first."""
    is_low: bool
    """Some are of low precision."""
    is_plain: bool
    """All parameters are whole, real tensors, so that their local parts are themselves."""


@dataclass(slots=True, eq=False)
class Block:
    """The parameters of one group that train, in the forms that a step needs."""

    group: dict[str, Any]
    is_plain: bool
    """As in Traits."""
    indices: list[int]
    """Where its parameters stand in the group."""
    params: list[Tensor]
    """As handed to the optimizer: DTensor, complex ..."""
    values: list[Tensor]
    """What the step changes: local, real; masters where there are any."""
    grads: list[Tensor]
    """Local, real, not negated."""
    numel: int
    """Real numbers in the logical parameters."""

    def draws(self, step: int, names: list[str]) -> list[Draw]:
        """What the noise of each parameter depends on at `step`.

        Args:
          names: of all parameters of the group, from `noise_names`.
        """
        seed = self.group["seed"]
        return [
            (NoiseKey(seed, step, parameter_id(names[i])), layout(param))
            for i, param in zip(self.indices, self.params, strict=True)
        ]


def gather(groups: list[dict[str, Any]], known: dict[int, Traits]) -> list[Block]:
    """A block for every group.

    Args:
      known: what earlier calls found out about the groups; kept by the caller, filled here.
    Raises: ConfigError for sparse gradients.
    """
    return [_block(group, _traits(i, group["params"], known)) for i, group in enumerate(groups)]


def plain_grads(index: int, params: list[Tensor], known: dict[int, Traits]) -> list[Tensor] | None:
    """The gradients of a group whose parameters are all whole and real and train densely; None for others."""
    if not params or not _traits(index, params, known).is_plain:
        return None
    grads = []
    for param in params:
        grad = param.grad
        if grad is None or grad.layout is not torch.strided or not param.requires_grad:
            return None
        grads.append(grad)
    return grads


def noise_names(groups: list[dict[str, Any]], positions: dict[int, int] | None = None) -> list[list[str]]:
    """What keys the noise of every parameter of every group, no two alike: its name, its position where it has none.

    Two networks in one optimizer may both have a "weight"; the second is then another.

    Args:
      positions: where each parameter (by id) stands among all that are trained together; None: in this order.
    """
    seen: dict[str, int] = {}
    names: list[list[str]] = []
    for group in groups:
        given, first = group.get("param_names", ()), sum(map(len, names))
        found = []
        for i, param in enumerate(group["params"]):
            place = first + i if positions is None else positions[id(param)]
            name = str(given[i]) if i < len(given) else str(place)
            seen[name] = seen.get(name, 0) + 1
            found.append(name if seen[name] == 1 else f"{name}\0{seen[name]}")
        names.append(found)
    return names


def _traits(index: int, params: list[Tensor], known: dict[int, Traits]) -> Traits:
    found = known.get(index)
    dtype = params[0].dtype if params else None
    if (
        found is None
        or found.dtype is not dtype  # model.half() changes parameters in place, all of them
        or len(found.params) != len(params)
        or not all(map(operator.is_, found.params, params))
    ):
        is_plain = not any(isinstance(p, DTensor) or p.is_complex() for p in params)
        found = known[index] = Traits(list(params), dtype, any(p.dtype in LOW_PRECISION for p in params), is_plain)
    return found


def _block(group: dict[str, Any], traits: Traits) -> Block:
    kept = [i for i, param in enumerate(group["params"]) if _trains_densely(param)]
    params = [group["params"][i] for i in kept]
    grads = [local_like(param.grad, param) for param in params]
    values = list(params) if traits.is_plain else [local(p.detach()) for p in params]
    numel = sum(real_numel(param) for param in params)
    return Block(group, traits.is_plain, kept, params, values, grads, numel)


def _trains_densely(param: Tensor) -> bool:
    # A parameter that was frozen may keep an old gradient.
    if param.grad is None or not param.requires_grad:
        return False
    refuse_sparse([param])
    return True


def refuse_sparse(params: list[Tensor]) -> None:
    """Raise ConfigError where a gradient is sparse."""
    for param in params:
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise ConfigError(
                f"a gradient of layout {param.grad.layout} cannot be perturbed as a whole; use sparse=False in the "
                "embedding."
            )


def members(groups: Iterable[dict[str, Any]]) -> list[Any]:
    """What the groups hold, in their order: parameters, or the numbers that stand for them in a state."""
    return [param for group in groups for param in group["params"]]


def total_numel(blocks: Iterable[Block]) -> int:
    """Real numbers in the logical parameters of all blocks."""
    return sum(block.numel for block in blocks)


def real_numel(param: Tensor) -> int:
    """Real numbers in a parameter."""
    return param.numel() * (2 if param.is_complex() else 1)
