"""The best values for weights whose places are chosen: least squares on a support, all output channels at once.

Each channel has another support, so that no factorisation serves two of them. Conjugate gradients need only one product
with H a step for all channels together, and a handful of steps, because the scaling to a unit diagonal is Jacobi's
preconditioner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.compress.problem import DAMPING, LayerProblem
from limbeck.config import checked
from limbeck.errors import ConfigError

_TINY = 1e-30
"""Keeps rows without anything left to solve from dividing 0 by 0."""


@checked
class RefitConfig:
    """Least squares on a support."""

    steps: int = 30
    """Most conjugate-gradient steps."""
    tolerance: float = 1e-3
    """Stop when a step lowers the layer's error by less than this share of it."""
    damping: float = DAMPING
    """Share of the mean diagonal of H that is added to its diagonal."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.tolerance < 0 or self.damping < 0:
            raise ConfigError(
                f"refit: steps {self.steps}, tolerance {self.tolerance}, damping {self.damping}: expected 0 or more"
            )


def refit(problem: LayerProblem, keep: Tensor, config: RefitConfig) -> Tensor:
    """The weight B that loses least of the layer's outputs among those that are zero outside a support.

        min tr((B - W) H (B - W)')  over B with B = 0 where keep is False

    Args:
      problem: the layer; its mask is not looked at.
      keep: bool [O I], the support.
      config: steps, tolerance and damping.
    Returns: float32 [O I].
    Source: conjugate gradients of ALPS (2406.07831), with the residual masked in the stop test too.
    """
    gram = problem.moments.damped(config.damping)
    scale = gram.diagonal().sqrt()
    target = problem.weight * scale
    start = target.masked_fill(~keep, 0.0)
    return solve_on_support(target, gram / scale[:, None] / scale, keep, start, config.steps, config.tolerance) / scale


def solve_on_support(target: Tensor, gram: Tensor, keep: Tensor, start: Tensor, steps: int, tolerance: float) -> Tensor:
    """Conjugate gradients from `start` [O I] (zero outside of `keep`) for H [I I] with a unit diagonal."""
    solution, inside = start.clone(), keep.float()
    difference = target - start
    residual = difference @ gram
    error = (difference * residual).sum()
    residual *= inside
    direction = residual.clone()
    square = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        product = direction @ gram
        length = square / (direction * product).sum(1, keepdim=True).clamp_min(_TINY)
        solution.addcmul_(length, direction)
        residual.sub_(product.mul_(inside).mul_(length))
        gain = (length * square).sum()
        error -= gain
        if bool(gain <= tolerance * error):
            break
        before, square = square, residual.square().sum(1, keepdim=True)
        direction = torch.addcmul(residual, square / before.clamp_min(_TINY), direction)
    return solution.masked_fill_(~keep, 0.0)  # no negative zeros
