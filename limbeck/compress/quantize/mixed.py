"""Mixed bits: which grid every layer gets, so that all of them fit into a number of bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from limbeck.compress.quantize.grid import Grid
from limbeck.errors import CompressionError, ConfigError

_CELLS = 20_000
"""Sizes are told apart to this share of the budget; finer than any layer, and quick for hundreds of layers."""
_SCALE_BYTES = 2


class Option(NamedTuple):
    """One grid for one layer."""

    loss: float
    """What it costs: layer error times the layer's importance, 0 or more."""
    size: int
    """Bytes."""


def quantized_bytes(outputs: int, inputs: int, grid: Grid) -> int:
    """Bytes of a layer's codes and of its 16-bit scales."""
    return math.ceil(outputs * inputs * grid.bits / 8) + outputs * grid.groups(inputs) * _SCALE_BYTES


def choose(layers: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The option of every layer: min sum of losses subject to sum of sizes <= budget.

    By dynamic programming over the bytes that are spent above the smallest options. Exact when these, divided by their
    greatest common divisor, fit into 20,000 cells; otherwise sizes are rounded up to cells, so that the budget holds
    and each layer wastes less than a cell.

    Args:
      layers: options [layer][option].
      budget: bytes for all layers.
    Returns: an index for each layer.
    Raises: CompressionError when not even the smallest options fit; ConfigError for a layer without options, or a loss
      that is no number.
    """
    if not all(map(_is_sound, layers)):
        raise ConfigError("mixed bits: every layer needs an option, and every loss must be a finite number.")
    floors = list(map(_smallest, layers))
    spare = budget - sum(floors)
    if spare < 0:
        raise CompressionError(
            f"mixed bits: the smallest options take {sum(floors)} bytes, more than the budget of {budget}; raise it "
            "or offer fewer bits."
        )
    extra = [[option.size - floor for option in options] for options, floor in zip(layers, floors, strict=True)]
    if sum(map(max, extra)) <= spare:
        return [min(range(len(options)), key=options.__getitem__) for options in layers]
    cell = max(math.gcd(*itertools.chain.from_iterable(extra)), math.ceil(spare / _CELLS), 1)
    return _fill(layers, [[-(-size // cell) for size in sizes] for sizes in extra], spare // cell)


def _smallest(options: Sequence[Option]) -> int:
    return min(option.size for option in options)


def _is_sound(options: Sequence[Option]) -> bool:
    return bool(options) and all(math.isfinite(option.loss) for option in options)


def _fill(layers: Sequence[Sequence[Option]], cells: list[list[int]], room: int) -> list[int]:
    """Options with the least loss whose cells fit into `room`; one row of the table a layer."""
    least, taken = np.zeros(room + 1), []
    for options, sizes in zip(layers, cells, strict=True):
        table = np.full((len(options), room + 1), np.inf)
        for row, option, size in zip(table, options, sizes, strict=True):
            if size <= room:
                row[size:] = least[: room + 1 - size] + option.loss
        taken.append(table.argmin(0))
        least = table.min(0)
    chosen = []
    for picks, sizes in zip(reversed(taken), reversed(cells), strict=True):
        chosen.append(int(picks[room]))
        room -= sizes[chosen[-1]]
    return chosen[::-1]
