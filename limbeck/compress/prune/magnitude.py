"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from torch import Tensor

from limbeck.compress.problem import LayerProblem
from limbeck.compress.prune.pattern import Pattern
from limbeck.config import checked


@checked
class MagnitudeConfig:
    """Nothing to choose."""


def solve(problem: LayerProblem, pattern: Pattern, config: MagnitudeConfig) -> Tensor:
    """The weight with its largest entries |W_ij| kept as they are and the others zero; looks at no inputs.

    Args:
      problem: the layer; weights that its mask forbids stay zero.
      pattern: share of zeros over the layer, or N of M.
      config: nothing to choose.
    Returns: float32 [O I].
    Raises: CompressionError when the pattern does not divide the inputs.
    Source: Han et al., Learning both weights and connections (1506.02626).
    """
    keep = pattern.largest(problem.weight.abs(), problem.mask)
    return problem.weight.masked_fill(~keep, 0.0)
