"""How the noise is spread: over the tensors, and over its own norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.optim.block import Block, Draw, real_numel, total_numel
from limbeck.optim.gates import exact_squares
from limbeck.optim.noise import draw, uniform
from limbeck.optim.sharding import sum_over_shards


def unit_stds(blocks: list[Block], domain: list[Block], noise_scale: str) -> dict[int, list[float | Tensor]]:
    """A coordinate's standard deviation at radius 1, for every parameter of every block (by id).

    Args:
      domain: the blocks that share the energy; those of other ranks too, where ranks hold different parameters.
    """
    if noise_scale == "coordinate":
        return {id(block): [1.0] * len(block.params) for block in blocks}
    if noise_scale == "relative":
        total = _squares(domain).sum()
        if total.device.type != "cpu" or total:
            return _relative_stds(blocks, total)
    std = 1 / math.sqrt(max(1, total_numel(domain)))
    return {id(block): [std] * len(block.params) for block in blocks}


def _relative_stds(blocks: list[Block], total: Tensor) -> dict[int, list[float | Tensor]]:
    """Each tensor's energy is its share of the squared norm, `total`."""
    sizes = torch.tensor([real_numel(p) for p in _params(blocks)], device=total.device)
    stds = iter((_squares(blocks) / total / sizes.clamp(min=1)).sqrt().float())
    return {id(block): [plain(next(stds)) for _ in block.params] for block in blocks}


def _params(blocks: list[Block]) -> list[Tensor]:
    return [p for block in blocks for p in block.params]


def _squares(blocks: list[Block]) -> Tensor:
    """[P] the squared norm of every parameter."""
    return sum_over_shards(_params(blocks), exact_squares([value for block in blocks for value in block.values]))


def shape_factor(
    domain: list[Block], noise: str, stds: dict[int, list[float | Tensor]], draws: dict[int, list[Draw]]
) -> float | Tensor:
    """1 for Gaussian noise; else what brings the noise's norm to 1 (sphere), or to U^(1/d) (ball)."""
    if noise == "gaussian":
        return 1.0
    params, squares = [], []
    for block in domain:
        for j, (key, where) in enumerate(draws[id(block)]):
            square = exact_squares([draw(key, where, block.values[j].device)])[0]
            params.append(block.params[j])
            squares.append(square * stds[id(block)][j] ** 2)
    # float32 hides the order in which shards were added up.
    norm = sum_over_shards(params, torch.stack(squares)).sum().sqrt().float()
    numel = total_numel(domain)
    if not numel:
        return 1.0
    if noise == "sphere":
        return 1.0 / plain(norm)
    first, _ = draws[id(domain[0])][0]
    return uniform(first._replace(parameter=0)) ** (1 / numel) / plain(norm)


def plain(value: Tensor) -> float | Tensor:
    """A CPU scalar as a number; an accelerator's stays where it is, so that nothing waits for it."""
    return float(value) if value.device.type == "cpu" else value
