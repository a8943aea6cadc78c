"""Prune and quantise together: the support is chosen knowing the grid, and the codes knowing the support.

One after the other, rounding aims at the pruned weights and repeats their error. Here both aim at the dense weights.
"""

from __future__ import annotations

from dataclasses import field, replace

from torch import Tensor

from limbeck.compress.problem import LayerProblem, layer_error
from limbeck.compress.prune import alps
from limbeck.compress.prune.alps import AlpsConfig
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.prune.refit import RefitConfig, refit
from limbeck.compress.quantize import gptq
from limbeck.compress.quantize.gptq import GptqConfig
from limbeck.compress.quantize.grid import Grid, Quantized
from limbeck.compress.quantize.quantease import QuantEaseConfig, descend
from limbeck.config import checked
from limbeck.errors import ConfigError


@checked
class JointConfig:
    """Support and codes in turn."""

    rounds: int = 3
    """Most times that the support is chosen and the codes are solved for it."""
    alps: AlpsConfig = field(default_factory=AlpsConfig)
    """How the first support is found."""
    quantease: QuantEaseConfig = field(default_factory=QuantEaseConfig)
    """How codes are found on a support."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds must be 1 or more; found {self.rounds}")


def solve(problem: LayerProblem, grid: Grid, config: JointConfig, *, pattern: Pattern) -> Quantized:
    """min tr((B - W) H (B - W)') over B with the pattern's zeros and codes on the grid, W dense.

    The projection on the pattern keeps the weights whose loss would cost most, H_jj u_j^2, of those that each would
    like best with the others as they are, u = B - (B - W) H / diag H; the one on the grid is coordinate descent.

    Args:
      problem: the layer; masked weights stay zero and count as the pattern's.
      pattern: share of zeros, or N:M.
    Returns: codes [O I], 0 outside the support, and scales [O G]; of the last round that lowered the error.
    Raises: CompressionError when the pattern or the group size does not divide the inputs.
    """
    hessian = problem.moments.damped(config.quantease.damping)
    diagonal = hessian.diagonal()
    weight = alps.solve(problem, pattern, config.alps)
    keep = pattern.largest(weight.abs() * diagonal.sqrt(), problem.mask)
    best, least = None, float("inf")
    for _ in range(config.rounds):
        quantized = _round_on(problem, weight, keep, grid, config.quantease)
        value = quantized.dequantize()
        error = layer_error(problem, value)
        if error >= least:
            break
        best, least = quantized, error
        wanted = value - (value - problem.weight) @ hessian / diagonal
        keep = pattern.largest(wanted.square() * diagonal, problem.mask)
        weight = refit(problem, keep, RefitConfig(damping=config.quantease.damping))
    assert best is not None  # at least one round
    return best


def _round_on(problem: LayerProblem, weight: Tensor, keep: Tensor, grid: Grid, config: QuantEaseConfig) -> Quantized:
    """Codes on a support: GPTQ for the pruned weight, which made up for the zeros, then descent to the dense one."""
    begin = gptq.solve(replace(problem, weight=weight, mask=keep), grid, GptqConfig(damping=config.damping))
    return descend(replace(problem, mask=keep), begin, config)
