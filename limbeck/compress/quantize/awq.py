"""AWQ: inputs with large values keep more of their weights' precision, by a factor on their weights.

Source: 2306.00978. Deviations: the error is that of the layers on their second moments, so no activations are kept;
clipping is the rounding solver's `clip`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from limbeck.compress.problem import LayerProblem, layer_error
from limbeck.compress.quantize import rtn
from limbeck.compress.quantize.grid import Grid
from limbeck.compress.quantize.rtn import RtnConfig
from limbeck.config import checked
from limbeck.errors import ConfigError

_SMALLEST = 1e-4
"""Factors stay between this and its inverse, so that a dead input has no factor of 0."""


@checked
class AwqConfig:
    """Factors by a search for one exponent."""

    points: int = 20
    """Exponents tried above 0, evenly up to 1."""

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ConfigError(f"points must be 1 or more; found {self.points}")


def factors(problems: Sequence[LayerProblem], grid: Grid, config: AwqConfig) -> Tensor:
    """s_j = mean|x_j|^a / sqrt(max_i s_i min_i s_i), a in [0, 1] with the least error of rounding W s to nearest.

    The layers' input columns are multiplied by s, and the module before them is divided by s, so that nothing changes
    but what rounding does.

    Args:
      problems: the layers that share one input; their relative errors are added up.
    Returns: float32 [I], positive; all 1 (a = 0) when nothing is better, or no input was seen.
    Raises: CompressionError when the group size does not divide the inputs.
    """
    magnitude = problems[0].moments.absolute_mean
    best, least = torch.ones_like(magnitude), float("inf")
    if not bool(magnitude.any()):
        return best
    magnitude = (magnitude / magnitude.max()).clamp(min=torch.finfo(torch.float32).tiny)
    for point in range(config.points + 1):
        raised = magnitude.pow(point / config.points)
        scaled = (raised / (raised.max() * raised.min()).sqrt()).clamp(_SMALLEST, 1 / _SMALLEST)
        error = sum(_rounding_error(problem, scaled, grid) for problem in problems)
        if error < least:
            best, least = scaled, error
    return best


def _rounding_error(problem: LayerProblem, factor: Tensor, grid: Grid) -> float:
    scaled = replace(problem, weight=problem.weight * factor)
    return layer_error(problem, rtn.solve(scaled, grid, RtnConfig(clip="none")).dequantize() / factor)
