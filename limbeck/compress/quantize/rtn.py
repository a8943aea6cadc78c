"""Rounding to nearest, with scales that may clip."""

from __future__ import annotations

from limbeck.compress.problem import LayerProblem
from limbeck.compress.quantize.grid import Grid, Quantized, encode
from limbeck.compress.quantize.scales import check_clip, fit_scales
from limbeck.config import checked


@checked
class RtnConfig:
    """Rounding to nearest."""

    clip: str = "mse"
    """none | mse | moments: how scales are searched; `moments` weighs every input by its mean square."""

    def __post_init__(self) -> None:
        check_clip(self.clip)


def solve(problem: LayerProblem, grid: Grid, config: RtnConfig) -> Quantized:
    """The nearest codes: round(W / s).

    Args:
      problem: the layer; its moments matter only to `clip: moments`.
    Returns: codes [O I] and scales [O G]; masked weights have code 0.
    Raises: CompressionError when the group size does not divide the inputs.
    """
    weight = problem.weight if problem.mask is None else problem.weight * problem.mask
    return encode(weight, fit_scales(problem, grid, config.clip, problem.moments.damped().diagonal()), grid)
