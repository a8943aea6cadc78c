"""Which weights may stay: a share of them, or N of every M along the inputs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.errors import CompressionError, ConfigError

_SAMPLE = 8192
"""Scores that are looked at to bracket a threshold."""

_FEW = 8
"""Groups up to this size are ranked by comparing all pairs."""


class Pattern(NamedTuple):
    """A share of zeros, or groups of `group` inputs of which `kept` stay."""

    sparsity: float
    """Share of the weights that become zero, 0 <= x < 1."""
    kept: int | None = None
    """Weights that stay of every group; None for a share over the whole layer."""
    group: int | None = None
    """Consecutive inputs in a group."""

    @classmethod
    def parse(cls, text: str | float) -> Pattern:
        """`0.5` (share of zeros) or `2:4` (2 of every 4 inputs stay).

        Note: N:M names what stays, as in the hardware's 2:4; some tools name what goes.
        Raises: ConfigError for anything else.
        """
        try:
            if ":" in str(text):
                kept, group = (int(part) for part in str(text).split(":"))
                if 0 < kept <= group:
                    return cls(1 - kept / group, kept, group)
            elif 0 <= float(text) < 1:
                return cls(float(text))
        except ValueError:
            pass
        raise ConfigError(f"pattern: {text!r} is neither a share of zeros in [0, 1) nor N:M with 0 < N <= M.")

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else f"{self.sparsity:g}"

    def check(self, inputs: int, name: str = "layer") -> None:
        """Raises: CompressionError when the group does not divide the inputs."""
        if self.group and inputs % self.group:
            raise CompressionError(
                f"{name}: pattern {self}, but its {inputs} inputs are no multiple of {self.group}; choose another "
                "pattern, or leave this layer out with `ignore`."
            )

    def largest(self, scores: Tensor, mask: Tensor | None = None, *, per_row: bool = False) -> Tensor:
        """The entries that stay when the highest scores stay: bool [O I], exactly as many as the pattern says.

        Args:
          scores: float [O I], 0 or more.
          mask: bool [O I]; entries that are False never stay, so fewer may stay than the pattern allows.
          per_row: the same number in every row (Wanda); otherwise over the whole layer. N:M is per group anyway.
        Raises: CompressionError when the group does not divide the inputs.
        """
        if mask is not None:
            scores = scores.masked_fill(~mask, -1.0)
        rows, inputs = scores.shape
        self.check(inputs)
        if self.group:
            keep = _largest_of_few(scores.reshape(-1, self.group), self.kept or 0)
        elif per_row:
            keep = _largest(scores, inputs - round(self.sparsity * inputs))
        else:
            keep = largest_of_all(scores.reshape(-1), scores.numel() - round(self.sparsity * scores.numel()))
        keep = keep.view(rows, inputs)
        return keep if mask is None else keep & mask


def largest_of_all(scores: Tensor, count: int) -> Tensor:
    """The `count` largest entries of a vector, bool [n]; several times faster than a selection from all of them.

    A sample brackets the threshold, so that only the few entries inside the bracket are selected from. The result is
    exact: where the sample misleads, the selection goes over all.
    """
    stride = len(scores) // _SAMPLE | 1  # odd, to go through all columns of matrices of usual sizes
    if stride < 8:
        return _largest(scores, count)
    sample = scores[::stride].sort(descending=True).values
    place, margin = count * len(sample) // len(scores), 2 * math.isqrt(len(sample))
    if not margin <= place < len(sample) - margin:
        return _largest(scores, count)
    keep = scores > sample[place - margin]
    unsure = ((scores >= sample[place + margin]) ^ keep).nonzero()[:, 0]
    missing = count - int(keep.count_nonzero())
    if not 0 <= missing <= len(unsure):
        return _largest(scores, count)
    keep[unsure[scores[unsure].topk(missing, sorted=False).indices]] = True
    return keep


def _largest_of_few(scores: Tensor, count: int) -> Tensor:
    """The `count` largest entries of each row [n M], bool; of equal ones the earlier.

    Counts for every entry those before it; a selection sorts row by row, at several times the price.
    """
    if scores.shape[1] > _FEW:
        return _largest(scores, count)
    columns = scores.T.contiguous()
    keep = torch.empty_like(columns, dtype=torch.bool)
    for place, column in enumerate(columns):
        better = torch.zeros_like(column, dtype=torch.uint8)
        for other, rival in enumerate(columns):
            if other != place:
                better += rival >= column if other < place else rival > column
        torch.lt(better, count, out=keep[place])
    return keep.T.contiguous()


def _largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest entries along the last dimension, bool."""
    index = scores.topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)
