"""Depth: which whole layers a model does without, one at a time, by the loss that is measured without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from limbeck.compress.passes import Passes
from limbeck.errors import CompressionError


class Depth(NamedTuple):
    """Layers that stay, and how the loss rose as the others went."""

    kept: tuple[int, ...]
    """Sorted."""
    removed: tuple[int, ...]
    """In the order of removal."""
    losses: tuple[float, ...]
    """Mean loss a token after each removal."""


def remove_layers(passes: Passes, count: int) -> Depth:
    """Remove the layer whose absence costs least, `count` times.

    Args:
      passes: the model, and held-out tokens for the loss.
      count: layers to remove; at least one stays.
    Raises: CompressionError when none would stay.
    """
    kept = list(range(len(passes.layers)))
    if not 0 <= count < len(kept):
        raise CompressionError(f"depth: remove {count} of {len(kept)} layers; expected 0 to {len(kept) - 1}.")
    removed, losses = [], []
    for _ in range(count):
        without = losses_without(passes, kept)
        place = min(range(len(kept)), key=without.__getitem__)
        removed.append(kept.pop(place))
        losses.append(without[place])
    return Depth(tuple(kept), tuple(removed), tuple(losses))


def losses_without(passes: Passes, kept: Sequence[int]) -> list[float]:
    """Mean loss a token without each of the kept layers in turn.

    The hidden states before a layer are those of the whole model, so every candidate costs only the layers after it,
    and no more than one hidden state is held.
    """
    sums = [0.0] * len(kept)
    for number, hidden in enumerate(passes.entered):
        for place, layer in enumerate(kept):
            sums[place] += passes.loss(number, passes.run(hidden, kept[place + 1 :]))
            hidden = passes.run(hidden, [layer])
    return [value / passes.tokens for value in sums]
