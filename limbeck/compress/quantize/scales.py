"""Scales before anything is known of the codes: as wide as the weights reach, or clipped where that loses less.

Source: clipping by search as in AWQ (2306.00978) and in the MSE observers of the quantisation libraries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.compress.problem import LayerProblem
from limbeck.compress.quantize.grid import Grid
from limbeck.errors import ConfigError

CLIPS = ("none", "mse", "moments")
_SHARES = 20
_SMALLEST_SHARE = 0.5
_ROWS = 128
"""Outputs searched together; few enough to stay in the cache."""


def check_clip(clip: str) -> None:
    """Raises: ConfigError unless `clip` is one of CLIPS."""
    if clip not in CLIPS:
        raise ConfigError(f"clip must be one of {', '.join(CLIPS)}; found {clip!r}")


def fit_scales(problem: LayerProblem, grid: Grid, clip: str, importance: Tensor) -> Tensor:
    """Scales for rounding to nearest: argmin over s of sum_j h_j (round(w_j / s) s - w_j)^2 for every group.

    Args:
      problem: the layer; masked weights do not count.
      clip: none: s reaches the largest weight; mse: the search with h_j = 1; moments: with h_j = importance_j.
      importance: float32 [I], what a squared error of each input costs.
    Returns: float32 [O G], 0.5 to 1 times what reaches the largest weight; 1 is a candidate, so that by its own measure
      a search is never worse than none.
    Raises: CompressionError when the group size does not divide the inputs.
    """
    weight = problem.weight if problem.mask is None else problem.weight * problem.mask
    reaching = grid.scales(weight, problem.name)
    if clip == "none":
        return reaching
    cost = (importance if clip == "moments" else torch.ones_like(importance)).view(reaching.shape[1], -1)
    parts = zip(weight.split(_ROWS), reaching.split(_ROWS), strict=True)
    return torch.cat([_search(rows.view(*scales.shape, -1), scales, cost, grid) for rows, scales in parts])


def _search(grouped: Tensor, reaching: Tensor, cost: Tensor, grid: Grid) -> Tensor:
    """Best scales [O G] for weights [O G each], where a squared error costs [G each]."""
    best, least = reaching, torch.full_like(reaching, torch.inf)
    for share in torch.linspace(1.0, _SMALLEST_SHARE, _SHARES + 1).tolist():
        scales = grid.storable(reaching * share)
        units = grouped / scales[..., None]
        error = grid.round(units).sub_(units).square_().mul_(cost).sum(-1).mul_(scales.square())
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best
