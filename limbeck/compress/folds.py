"""Which normalisation can take the inverse of the factors on a group's weights: found by running the block.

W x = (W s)(x / s), so a group's input columns may be multiplied by s if the normalisation that yields x divides its
gain by s. That is exact only where nothing else reads x: no layer that is left as it is, no router, no second norm
behind the first. Names do not tell, so each block is run with factors and without.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.compress.blocks import Group

_TOLERANCE = 1e-4
"""Largest difference of a block's output, in units of what the block adds; folds that are none change it by 1e-2."""
_SPREAD = 0.7
"""Factors of the trial lie between exp(-0.7) and exp(0.7)."""


class Fold(NamedTuple):
    """A normalisation whose output a group alone reads."""

    norm: Any
    name: str
    """Of the norm's weight within the block."""
    offset: float
    """Its gain is weight + offset; 0 or 1."""

    def folded(self, factors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weight with its gain divided by factors as near as `dtype` holds it, and the factors that this means.

        The group's columns are multiplied by the latter, so that rounding the norm's weight loses nothing.
        """
        gain = self.norm.weight + self.offset
        weight = (gain / factors - self.offset).to(dtype).float()
        stored = weight + self.offset
        usable = (gain != 0) & (stored != 0) & torch.isfinite(stored)
        weight = torch.where(usable, weight, self.norm.weight)
        return weight, torch.where(usable, gain / torch.where(usable, stored, 1.0), 1.0)

    def apply(self, factors: Tensor, weight: Tensor) -> None:
        """Set the weight, and divide the bias where there is one."""
        self.norm.weight.data = weight
        if getattr(self.norm, "bias", None) is not None:
            self.norm.bias.data = self.norm.bias.data / factors


@torch.no_grad()
def find_folds(block: Any, groups: Sequence[Group], hidden: Tensor, call: Mapping[str, Any]) -> dict[str, Fold]:
    """The fold of every group that has one, by the group's name.

    Args:
      block: with its weights.
      groups: those that take factors, without the layers that are left as they are.
      hidden, call: what the block is called with; float [1 T D].
    """
    plain = _output(block, hidden, call)
    scale = (plain - hidden).abs().max()
    folds = {}
    for group in groups:
        for fold in _candidates(block, group, hidden, call):
            trial = copy.deepcopy(block)
            _scale(trial, group, fold)
            if bool((_output(trial, hidden, call) - plain).abs().max() <= _TOLERANCE * scale):
                folds[group.name] = fold
                break
    return folds


def _candidates(block: Any, group: Group, hidden: Tensor, call: Mapping[str, Any]) -> list[Fold]:
    """The norm whose output is the group's input, with either offset."""
    read: list[Any] = []
    made: dict[int, tuple[str, nn.Module, Tensor]] = {}
    first = next(iter(group.linears.values()))
    handles = [first.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))]
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (first.in_features,):
            handles.append(module.register_forward_hook(_keep(made, name)))
    try:
        _output(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    if not read or read[0].data_ptr() not in made:
        return []
    name, norm, _ = made[read[0].data_ptr()]
    return [Fold(norm, f"{name}.weight", offset) for offset in (0.0, 1.0)]


def _keep(made: dict[int, tuple[str, nn.Module, Tensor]], name: str) -> Any:
    # The output is held, so that no later tensor gets its place in memory.
    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        made[output.data_ptr()] = (name, module, output)

    return keep


def _scale(trial: Any, group: Group, fold: Fold) -> None:
    """Fold trial factors into a copy of the block."""
    size = fold.norm.weight.shape
    draw = torch.Generator().manual_seed(0)
    factors = (_SPREAD * (2 * torch.rand(size, generator=draw) - 1)).exp().to(fold.norm.weight.device)
    own = fold._replace(norm=trial.get_submodule(fold.name.rpartition(".")[0]))
    weight, factors = own.folded(factors, torch.float32)
    own.apply(factors, weight)
    for name in group.linears:
        linear = trial.get_submodule(name)
        linear.weight.data = linear.weight.data * factors


def _output(block: Any, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
    output = block(hidden, **call)
    return output[0] if isinstance(output, tuple) else output
