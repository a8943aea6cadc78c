"""SmoothQuant: moves large inputs into the weights, so that both can be rounded.

Source: 2211.10438.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.compress.problem import LayerProblem
from limbeck.compress.quantize.grid import Grid
from limbeck.config import checked
from limbeck.errors import ConfigError

_SMALLEST = 1e-5


@checked
class SmoothQuantConfig:
    """Factors by the largest values."""

    alpha: float = 0.5
    """How much of the inputs' spread moves into the weights, 0 to 1; more (0.8) for models with large outliers."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha must be in 0 to 1; found {self.alpha}")


def factors(problems: Sequence[LayerProblem], grid: Grid, config: SmoothQuantConfig) -> Tensor:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), the maximum over the outputs of all layers.

    The layers' input columns are multiplied by s, and the module before them, which yields x, is divided by s.

    Args:
      problems: the layers that share one input.
      grid: not looked at; every family of factors is called alike.
    Returns: float32 [I], positive; 1 for inputs that are always zero or have no weight, where there is nothing to move.
    """
    inputs = problems[0].moments.absolute_max
    weights = torch.stack([problem.weight.abs().amax(0) for problem in problems]).amax(0)
    moved = inputs.clamp(min=_SMALLEST).pow(config.alpha) / weights.clamp(min=_SMALLEST).pow(1 - config.alpha)
    return torch.where((inputs > 0) & (weights > 0), moved.clamp(min=_SMALLEST), 1.0)
