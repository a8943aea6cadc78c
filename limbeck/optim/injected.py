"""Adding noise to parameters: how it is spread, and what low precision makes of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.optim import gates
from limbeck.optim.block import Block, Draw, gather, noise_names, total_numel
from limbeck.optim.noise import add_noise_
from limbeck.optim.noisy import NoisyOptimizer
from limbeck.optim.settings import LOW_PRECISION
from limbeck.optim.sharding import sum_over_shards
from limbeck.optim.spread import plain, shape_factor, unit_stds


@dataclass(frozen=True, slots=True)
class Joint:
    """The descent of a block whose low-precision parameters are summed with their noise in float32 and rounded once."""

    directions: list[Tensor]
    lr: float | Tensor
    decay: float

    def of(self, index: int) -> dict[str, Any]:
        """The arguments of `add_noise_` for one parameter."""
        return {"direction": self.directions[index], "lr": self.lr, "decay": self.decay}


def is_noise(amount: float | Tensor) -> bool:
    """Whether noise of this radius is to be drawn; an accelerator's radius may be 0, which only it knows."""
    return isinstance(amount, Tensor) or amount != 0.0


class InjectingOptimizer(NoisyOptimizer):
    """An optimizer that adds noise of a given radius to its parameters; a subclass decides when, and how much."""

    _warned = False

    def _add_noise(self, blocks: list[Block], amounts: Sequence[float | Tensor], joint: Sequence[Joint | None]) -> None:
        """Add noise of radius `amounts[i]` to block i; a Joint descent is done in the same float32 sum."""
        noisy = [i for i, block in enumerate(blocks) if block.params and is_noise(amounts[i])]
        if not noisy:
            return
        self._warn_if_lost(blocks, amounts)
        first, names = self.param_groups[0], self._noise_names()
        domain = self._noisy_domain(blocks)
        units = unit_stds(blocks, domain, first["noise_scale"])
        factor = self._shape_factor(domain)
        params, squares = [], []
        for i in noisy:
            stds = [amounts[i] * (unit * factor) for unit in units[id(blocks[i])]]
            squares += _add_to_block(blocks[i], first["noise_step"] - 1, names[i], stds, joint[i])
            params += blocks[i].params
        values = torch.stack([torch.as_tensor(square, dtype=torch.float32) for square in squares])
        self._noise_square = plain(sum_over_shards(params, values).sum())

    def _domain(self, blocks: list[Block]) -> list[Block]:
        """The blocks that the gate and the noise's energy speak of: those of all ranks that share this optimizer."""
        owner = self._owner_of_all()
        if owner is None:
            return blocks
        groups = [
            {**mine, "params": all_ranks["params"]}
            for mine, all_ranks in zip(self.param_groups, owner.param_groups, strict=True)
        ]
        return gather(groups, self.__dict__.setdefault("_owner_traits", {}))

    def _noisy_domain(self, blocks: list[Block]) -> list[Block]:
        return [block for block in self._domain(blocks) if block.params and not self._is_quiet(block.group)]

    def _shape_factor(self, domain: list[Block]) -> float | Tensor:
        first = self.param_groups[0]
        if first["noise"] == "gaussian":
            return 1.0
        owner = self._owner_of_all()
        names = self._noise_names() if owner is None else noise_names(owner.param_groups)
        order = {id(group["params"]): i for i, group in enumerate((owner or self).param_groups)}
        draws: dict[int, list[Draw]] = {
            id(block): block.draws(first["noise_step"] - 1, names[order[id(block.group["params"])]]) for block in domain
        }
        return shape_factor(domain, first["noise"], unit_stds(domain, domain, first["noise_scale"]), draws)

    def _warn_if_lost(self, blocks: list[Block], amounts: Sequence[float | Tensor]) -> None:
        rounded = (value for b in blocks if b.group["low_precision"] != "master" for value in b.values)
        low = [value for value in rounded if value.dtype in LOW_PRECISION]
        if self._warned or not low:
            return
        self._warned = True
        numel = 1 if blocks[0].group["noise_scale"] == "coordinate" else total_numel(blocks)
        std, step = max(map(float, amounts)) / math.sqrt(numel), _rounding_step(low)
        if 0 < std < step / 4:
            warnings.warn(
                f"{type(self).__name__}: the noise's standard deviation {std:.1e} is below a quarter of the rounding "
                f"step {step:.1e} of {low[0].dtype} parameters, so rounding drowns it; use float32 parameters or "
                "low_precision='master'.",
                stacklevel=4,
            )


def _add_to_block(
    block: Block, step: int, names: list[str], stds: list[Any], descent: Joint | None
) -> list[float | Tensor]:
    """Squared norms of what was added to each parameter."""
    squares = []
    for j, (key, where) in enumerate(block.draws(step, names)):
        value = block.values[j]
        is_low = value.dtype in LOW_PRECISION
        extra = descent.of(j) if descent and is_low else {}
        stochastic = is_low and block.group["low_precision"] == "stochastic"
        squares.append(add_noise_(value, key, where, stds[j], stochastic=stochastic, **extra))
    return squares


def _rounding_step(values: list[Tensor]) -> float:
    """Of a number as large as the root mean square of `values`."""
    rms = math.sqrt(float(gates.exact_squares(values).sum()) / max(1, sum(value.numel() for value in values)))
    return rms * torch.finfo(values[0].dtype).eps
