"""Rounding one input after the other, each knowing what became of those before it: the loop of GPTQ and QuantEase.

Weights are transposed here, [I O]: an input's weights are a contiguous row, and all outputs go through at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.compress.quantize.grid import Grid


class Turn(NamedTuple):
    """What became of a block of b inputs."""

    new: Tensor
    """float32 [b O], the weights."""
    moves: Tensor
    """float32 [b O], new - old, or new - wanted where there was no old."""
    wanted: Tensor
    """float32 [b O], what would have been best for each input, all before it being as they are."""


def round_in_turn(
    target: Tensor, coupling: Tensor, scales: Tensor, grid: Grid | None, mask: Tensor | None, old: Tensor | None = None
) -> Turn:
    """Settle inputs in turn: wanted_j = target_j - sum_{i<j} coupling_ji moves_i, new_j = round(wanted_j).

    Args:
      target: float32 [b O], what the inputs would want if none of the block moved.
      coupling: float32 [b b], how input j answers to a move of i < j; what is not below the diagonal is not read.
      scales: float32 [b O].
      grid: what to round to; None leaves the weights as wanted.
      mask: bool [b O]; False becomes zero.
      old: float32 [b O], the weights so far.
    """
    wanted, moves, new = target.clone(), torch.empty_like(target), torch.empty_like(target)
    since = wanted if old is None else old
    # Views made once: an index into a tensor costs as much as the arithmetic on a row.
    rows = zip(*(part.unbind() for part in (wanted, moves, new, scales, coupling, since)), strict=True)
    masks = None if mask is None else mask.unbind()
    for j, (want, move, value, scale, answer, before) in enumerate(rows):
        if j:
            want.addmv_(moves[:j].T, answer[:j], alpha=-1)
        if grid is None:
            value.copy_(want)
        else:
            torch.mul(grid.round(want / scale), scale, out=value)
        if masks is not None:
            value.mul_(masks[j])
        torch.sub(value, before, out=move)
    return Turn(new, moves, wanted)
