"""GPTQ: rounds the inputs in turn and lets those still free make up for the error.

Source: 2210.17323. Deviations: inputs are taken in the order of `Moments.ordered_factor`, whose sum of conditional
variances, and so the error, is smaller than by activation; scales are those of the original weight ("static groups"),
so a group's inputs stay next to each other in the file and no g_idx is written.
"""

from __future__ import annotations

import torch

from limbeck.compress.problem import DAMPING, LayerProblem
from limbeck.compress.quantize.columns import round_in_turn
from limbeck.compress.quantize.grid import Grid, Quantized, encode, spread
from limbeck.compress.quantize.scales import check_clip, fit_scales
from limbeck.config import checked
from limbeck.errors import ConfigError


@checked
class GptqConfig:
    """GPTQ."""

    clip: str = "moments"
    """none | mse | moments: how scales are searched; `moments` weighs every input by what an error of it costs once the
    inputs after it have made up for it."""
    ordered: bool = True
    """Round first the inputs that others can make up for least; otherwise as they stand."""
    damping: float = DAMPING
    """Share of H's mean diagonal that is added to its diagonal."""
    block: int = 64
    """Inputs rounded before the rest is brought up to date; for speed only."""

    def __post_init__(self) -> None:
        check_clip(self.clip)
        if self.damping < 0 or self.block < 1:
            raise ConfigError(f"damping must be 0 or more, block 1 or more; found {self.damping}, {self.block}")


def solve(problem: LayerProblem, grid: Grid, config: GptqConfig) -> Quantized:
    """Codes in turn: u_j = W_j + sum_{i<j} U_ij / U_ii (B_i - u_i), B_j = round(u_j).

    U is upper triangular, U'U = H^-1. The layer's error is the sum of (B_j - u_j)^2 / U_jj^2, which `clip: moments`
    weighs the inputs by.

    Args:
      problem: the layer.
    Returns: codes [O I] and scales [O G]; masked weights have code 0, and the others make up for that too.
    Raises: CompressionError when the group size does not divide the inputs.
    """
    order, factor = problem.moments.ordered_factor(config.damping, config.ordered)
    place, pivots = order.argsort(), factor.diagonal()
    scales = fit_scales(problem, grid, config.clip, pivots.pow(-2)[place])
    coupling = (factor / pivots[:, None]).T.neg()
    weight = problem.weight.T.contiguous()[order]
    steps = spread(scales, len(order)).T.contiguous()[order]
    mask = None if problem.mask is None else problem.mask.T.contiguous()[order]
    rounded, moves = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, len(order), config.block):
        block = slice(start, start + config.block)
        target = torch.addmm(weight[block], coupling[block, :start], moves[:start], alpha=-1)
        free = None if mask is None else mask[block]
        rounded[block], moves[block], _ = round_in_turn(target, coupling[block, block], steps[block], grid, free)
    return encode(rounded[place].T.contiguous(), scales, grid)
