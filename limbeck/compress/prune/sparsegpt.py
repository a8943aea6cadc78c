"""SparseGPT: column after column loses its smallest weights, and the columns to come make up for it."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.compress.problem import DAMPING, LayerProblem
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.prune.refit import RefitConfig, refit
from limbeck.config import checked
from limbeck.errors import ConfigError


@checked
class SparseGptConfig:
    """Elimination of columns, left to right."""

    block_size: int = 128
    """Columns whose zeros are chosen together, and after which the columns to the right are brought up to date."""
    refit: bool = False
    """Fit the kept weights once more, to the right and to the left; published without. About half of the error."""
    damping: float = DAMPING
    """Share of the mean diagonal of H that is added to its diagonal."""

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.damping < 0:
            raise ConfigError(f"block_size {self.block_size}, damping {self.damping}: expected at least 1 and 0")


def solve(problem: LayerProblem, pattern: Pattern, config: SparseGptConfig) -> Tensor:
    """The weight after every column gave up its zeros and the columns to its right made the best of it.

        score_ij = W_ij^2 / U_jj^2        W_i,>j <- W_i,>j - W_ij / U_jj U_j,>j  where W_ij goes,  U'U = H^-1

    A share of zeros is the same in every block of columns, counted over all output channels; N:M is chosen at the
    first column of each group.

    Args:
      problem: the layer; weights that its mask forbids stay zero.
      pattern: share of zeros, or N of M.
      config: block size, refit and damping.
    Returns: float32 [O I].
    Raises: CompressionError when the pattern does not divide the inputs.
    Source: SparseGPT (2301.00774).
    """
    inputs = problem.weight.shape[1]
    pattern.check(inputs)
    factor = problem.moments.inverse_factor(config.damping)
    columns = problem.weight.T.contiguous()  # so that a column lies in one piece
    stay = _staying(problem, pattern)
    width = pattern.group or config.block_size
    size = max(config.block_size // width, 1) * width
    for start in range(0, inputs, size):
        stop = min(start + size, inputs)
        errors = torch.empty_like(columns[start:stop])
        for first in range(start, stop, width):
            here, right = slice(first, min(first + width, stop)), slice(first, stop)
            keep = _choose(problem, pattern, columns[here] / factor.diagonal()[here, None], first, stay)
            errors[first - start : here.stop - start] = _eliminate(columns[right], factor[right, right], keep)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    weight = columns.T.contiguous()
    return refit(problem, weight != 0, RefitConfig(damping=config.damping)) if config.refit else weight


def _staying(problem: LayerProblem, pattern: Pattern) -> list[int]:
    """How many weights stay in the first j columns, for j = 0..I: an even share of the weights that are free."""
    outputs, inputs = problem.weight.shape
    if problem.mask is None:
        free = [outputs * column for column in range(inputs + 1)]
    else:
        free = [0, *problem.mask.sum(0).cumsum(0).tolist()]
    total = min(outputs * inputs - round(pattern.sparsity * outputs * inputs), free[-1])
    return [total * before // max(free[-1], 1) for before in free]


def _choose(problem: LayerProblem, pattern: Pattern, ratios: Tensor, first: int, stay: list[int]) -> Tensor:
    """Which weights of some columns stay, bool [n O], those with the largest |W_ij / U_jj|; ratios [n O]."""
    last = first + len(ratios)
    free = None if problem.mask is None else problem.mask[:, first:last]
    if pattern.group:
        return pattern.largest(ratios.T.abs(), free).T
    scores = ratios.abs() if free is None else ratios.abs().masked_fill(~free.T, -1.0)
    index = scores.view(-1).topk(stay[last] - stay[first], sorted=False).indices
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep.view(-1)[index] = True
    return keep


def _eliminate(columns: Tensor, factor: Tensor, keep: Tensor) -> Tensor:
    """Zero what does not stay in the first columns, and let all columns right of each make up for it, in place.

    Args:
      columns: [n O], the columns from the first one to the end of the block.
      factor: [n n], their part of U.
      keep: bool [m O], m <= n, what stays.
    Returns: the errors W_ij / U_jj, [m O], which the columns right of the block still have to see.
    """
    errors = torch.empty_like(columns[: len(keep)])
    for index, kept in enumerate(keep):
        torch.div(columns[index].masked_fill(kept, 0.0), factor[index, index], out=errors[index])
        columns[index].masked_fill_(~kept, 0.0)
        columns[index + 1 :].addr_(factor[index, index + 1 :], errors[index], alpha=-1)
    return errors
