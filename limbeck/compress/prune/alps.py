"""ALPS: a support and its values together, by splitting the layer problem from the sparsity.

Several times faster than published at about the same error: the step from B to D is over-relaxed, and the penalty
starts from the eigenvalues of H and grows by a fixed factor, where the published rule follows the changes of the
support. Convergence needs no more than the sum of 1/penalty to be finite. That leaves a handful of penalties, and one
Cholesky inverse for each costs half of the eigendecomposition that would serve them all.

Source: ALPS (2406.07831); Boyd et al., Distributed optimization via ADMM (2011), section 3.4.3 for over-relaxation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.compress.problem import DAMPING, LayerProblem
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.prune.refit import solve_on_support
from limbeck.config import checked
from limbeck.errors import ConfigError

_FLOOR = 0.01
"""Added to the eigenvalues before their mean is taken: where inputs are few, most eigenvalues are next to nothing."""


@checked
class AlpsConfig:
    """ADMM over the support, then conjugate gradients on it."""

    penalty: float = 0.35
    """First weight of the distance between B and its sparse copy, times the geometric mean of H's eigenvalues."""
    growth: float = 1.6
    """Factor on the penalty after every round; smaller is slower and finds a slightly better support."""
    steps: int = 5
    """Steps in a round, which share one inverse."""
    rounds: int = 30
    """Most rounds."""
    relaxation: float = 1.4
    """1 for plain ADMM, up to 2."""
    settled: float = 0.02
    """Stop when a round changes less than this share of the support."""
    refit_steps: int = 10
    """Most conjugate-gradient steps."""
    refit_tolerance: float = 1e-3
    """Stop when such a step lowers the layer's error by less than this share of it."""
    damping: float = DAMPING
    """Share of the mean diagonal of H that is added to its diagonal."""

    def __post_init__(self) -> None:
        if self.penalty <= 0 or self.growth <= 1 or not 0 < self.relaxation < 2:
            raise ConfigError(
                f"penalty {self.penalty}, growth {self.growth}, relaxation {self.relaxation}: expected more than 0, "
                "more than 1, and between 0 and 2"
            )
        if self.steps < 1 or self.rounds < 1 or self.refit_steps < 0 or self.damping < 0:
            raise ConfigError(
                f"steps {self.steps}, rounds {self.rounds}, refit_steps {self.refit_steps}, damping {self.damping}: "
                "expected at least 1, 1, 0 and 0"
            )


def solve(problem: LayerProblem, pattern: Pattern, config: AlpsConfig) -> Tensor:
    """The sparse weight that loses least of the layer's outputs.

        min tr((B - W) H (B - W)')  over B with the pattern's zeros

    Args:
      problem: the layer; weights that its mask forbids stay zero.
      pattern: share of zeros, or N of M.
      config: ADMM and refit.
    Returns: float32 [O I]; the largest weights where no input was seen.
    Raises: CompressionError when the pattern does not divide the inputs.
    Source: ALPS (2406.07831).
    """
    if not bool(problem.moments.gram.diagonal().any()):
        # Nothing seen: no weight can make up for another one.
        keep = pattern.largest(problem.weight.abs(), problem.mask)
        return problem.weight.masked_fill(~keep, 0.0)
    gram = problem.moments.damped(config.damping)
    scale = gram.diagonal().sqrt()
    gram = gram / scale[:, None] / scale
    target = problem.weight * scale
    sparse, keep = _admm(target, gram, problem, pattern, config)
    return solve_on_support(target, gram, keep, sparse, config.refit_steps, config.refit_tolerance) / scale


def _admm(
    target: Tensor, gram: Tensor, problem: LayerProblem, pattern: Pattern, config: AlpsConfig
) -> tuple[Tensor, Tensor]:
    """The sparse copy D and its support after ADMM; U is the dual variable divided by the penalty p.

    B = W + p (D - U - W) (H + p)^-1,  A = U + relaxed B,  D = the largest of A,  U = A - D
    """
    identity = torch.eye(len(gram), device=gram.device)
    penalty = config.penalty * _geometric_mean(gram + _FLOOR * identity)
    keep = pattern.largest(target.abs(), problem.mask)
    sparse, dual = target * keep.float(), torch.zeros_like(target)
    for _ in range(config.rounds):
        # In float32: the penalty keeps the sum well conditioned, and the refit corrects what B lacks in precision.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + penalty * identity))
        before = keep
        for _ in range(config.steps):
            dense = torch.addmm(target, (sparse - dual).sub_(target), inverse, alpha=penalty)
            dual += torch.lerp(sparse, dense, config.relaxation)
            keep = pattern.largest(dual.abs(), problem.mask)
            sparse = dual * keep.float()  # products with bool take several times as long
            dual -= sparse
        if int((keep != before).count_nonzero()) <= config.settled * int(keep.count_nonzero()):
            break
        penalty *= config.growth
        dual /= config.growth
    return sparse, keep


def _geometric_mean(matrix: Tensor) -> float:
    """Geometric mean of the eigenvalues, det^(1/I)."""
    return float((2 * torch.linalg.cholesky(matrix).diagonal().log().mean()).exp())
