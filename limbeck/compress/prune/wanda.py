"""Wanda: the weights go that move their output least, each taken alone."""

from __future__ import annotations

from torch import Tensor

from limbeck.compress.problem import DAMPING, LayerProblem
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.prune.refit import RefitConfig, refit
from limbeck.config import checked
from limbeck.errors import ConfigError


@checked
class WandaConfig:
    """Scores of weights and inputs, without interaction between weights."""

    refit: bool = False
    """Fit the kept weights to the layer's outputs afterwards; published without."""
    damping: float = DAMPING
    """Share of the mean diagonal of H that is added to its diagonal for the refit; the scores need none."""

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ConfigError(f"damping must be 0 or more; found {self.damping}")


def solve(problem: LayerProblem, pattern: Pattern, config: WandaConfig) -> Tensor:
    """The weight with the highest scores kept and the others zero, the same number in every output channel.

        score_ij = |W_ij| sqrt(H_jj)

    Args:
      problem: the layer; weights that its mask forbids stay zero.
      pattern: share of zeros in each output channel, or N of M.
      config: whether to refit.
    Returns: float32 [O I].
    Raises: CompressionError when the pattern does not divide the inputs.
    Source: Sun et al., A simple and effective pruning approach for large language models (2306.11695).
    """
    # Damping 0 leaves the diagonal as it is, yet orders inputs that are always zero by their weights.
    scores = problem.weight.abs() * problem.moments.damped(0.0).diagonal().sqrt()
    keep = pattern.largest(scores, problem.mask, per_row=True)
    if config.refit:
        return refit(problem, keep, RefitConfig(damping=config.damping))
    return problem.weight.masked_fill(~keep, 0.0)
