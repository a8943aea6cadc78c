"""Which weights may stay: a share of them, or N of every M along the inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.errors import CompressionError, ConfigError


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
        if self.group:
            if inputs % self.group:
                raise CompressionError(
                    f"pattern {self}: {inputs} inputs are no multiple of {self.group}; choose another pattern, or "
                    "leave this layer out with `ignore`."
                )
            grouped, count = scores.view(-1, self.group), self.kept or 0
        elif per_row:
            grouped, count = scores, inputs - round(self.sparsity * inputs)
        else:
            grouped, count = scores.reshape(1, -1), scores.numel() - round(self.sparsity * scores.numel())
        index = grouped.topk(count, dim=-1).indices
        keep = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, index, True).view(rows, inputs)
        return keep if mask is None else keep & mask
