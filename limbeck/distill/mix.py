"""How often a run reads each of its sources: pure functions of lengths and seed, so a resumed run sees the same order.

A source k of n_k examples and t_k tokens gives c_k of them to every epoch of the run:

    with epochs e_k    c_k = round(e_k n_k)
    with a share s_k   c_k = round(s_k / (1 - S) F n_k / t_k),  S the sum of all shares, F the tokens of the others

so that a source with a share has that share of an epoch's tokens, whatever the lengths of its traces. It is read in
shuffled passes, one behind the other: an epoch goes on where the one before it ended, and nothing is read twice before
all is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Portion(NamedTuple):
    """How much of a source an epoch of the run reads."""

    epochs: float = 1.0
    share: float | None = None
    """Of the tokens; None: as `epochs` says."""


class Mix(NamedTuple):
    """The examples of every source, and how many of them an epoch reads."""

    members: tuple[np.ndarray, ...]
    """int64 [n_k] each: indices of the examples of a source."""
    counts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], origins: Sequence[int], portions: Sequence[Portion]) -> Mix:
        """The mix of some examples.

        Args:
          lengths: tokens of each example.
          origins: the number of the source of each; every source has at least one.
          portions: of every source, by its number; shares sum to less than 1.

        >>> Mix.of([10, 10, 10, 5, 5], [0, 0, 0, 1, 1], [Portion(), Portion(share=0.25)]).counts
        (3, 2)
        """
        sizes, owner = np.asarray(lengths, dtype=np.int64), np.asarray(origins)
        members = tuple(np.flatnonzero(owner == number) for number in range(len(portions)))
        means = [float(sizes[own].mean()) for own in members]
        counts = [max(1, round(p.epochs * len(own))) for p, own in zip(portions, members, strict=True)]
        shares = [portion.share for portion in portions]
        others = sum(n * mean for n, mean, share in zip(counts, means, shares, strict=True) if share is None)
        rest = 1 - sum(share or 0.0 for share in shares)
        return cls(
            members,
            tuple(
                n if share is None else max(1, round(share / rest * others / mean))
                for n, mean, share in zip(counts, means, shares, strict=True)
            ),
        )

    @property
    def size(self) -> int:
        """Examples of an epoch."""
        return sum(self.counts)

    def tokens(self, lengths: Sequence[int]) -> float:
        """Tokens of an epoch in the mean."""
        sizes = np.asarray(lengths, dtype=np.float64)
        return float(sum(n * sizes[own].mean() for n, own in zip(self.counts, self.members, strict=True)))

    def epoch(self, number: int, seed: int) -> np.ndarray:
        """int64 [size]: what epoch `number` reads, source after source."""
        return np.concatenate([self._read(source, number, seed) for source in range(len(self.members))])

    def _read(self, source: int, epoch: int, seed: int) -> np.ndarray:
        own, count = self.members[source], self.counts[source]
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // len(own), -(-last // len(own)))
        # The last number is never 0: seeds that differ in zeros at their end are the same.
        rows = [own[np.random.default_rng((seed, one, source + 1)).permutation(len(own))] for one in passes]
        start = first - passes.start * len(own)
        return np.concatenate(rows)[start : start + count]
