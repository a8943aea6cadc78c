"""Teacher entries as bytes: a ragged table of token ids with a small integer each, about 2 bytes an entry.

A row is what the teacher says at one position. Ids are sorted within a row and kept as gaps, probabilities as levels
of their square root; every byte of these integers makes a plane of its own, deflated where that makes it shorter. High
bytes of gaps and levels are nearly constant, low bytes are nearly noise, so together they would compress badly.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from limbeck.teacher.topk import TopKTargets

ENTRY_LEVELS = 2**10 - 1
TAIL_LEVELS = 2**16 - 1
MOST_ENTRIES = 255
"""Entries in a row, since their number is kept in one byte."""


@dataclass(frozen=True, slots=True)
class Entries:
    """N rows of entries, one behind the other."""

    counts: np.ndarray
    """int64 [N]: entries of each row, at least 1."""
    ids: np.ndarray
    """int64 [E], increasing within a row."""
    levels: np.ndarray
    """int64 [E]: sqrt(probability) in units of 1 / ENTRY_LEVELS, or how often the entry was drawn."""
    tails: np.ndarray
    """int64 [N]: sqrt(mass that is not kept) in units of 1 / TAIL_LEVELS."""

    def select(self, rows: np.ndarray) -> Entries:
        """The given rows, in that order."""
        starts, counts = np.cumsum(self.counts) - self.counts, self.counts[rows]
        index = np.repeat(starts[rows] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        return Entries(counts, self.ids[index], self.levels[index], self.tails[rows])

    @classmethod
    def join(cls, parts: Sequence[Entries]) -> Entries:
        """All rows of all parts."""
        names = ("counts", "ids", "levels", "tails")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def targets(self, num_draws: int | None = None) -> TopKTargets:
        """Padded to the longest row with log-probability -inf; `num_draws`: levels are counts out of so many draws."""
        if num_draws is None:
            tails = np.square(self.tails / TAIL_LEVELS)
            weights = np.square(self.levels.astype(np.float64))
            # The levels of a row are rounded apart; its sum is known. That of a row which is all tail is 0.
            sums = np.add.reduceat(weights, np.cumsum(self.counts) - self.counts)
            scale = (1 - tails) / np.maximum(1, sums)
            probs = weights * np.repeat(scale, self.counts)
        else:
            probs, tails = self.levels / num_draws, np.zeros(len(self.counts))
        with np.errstate(divide="ignore"):
            log_probs, log_tails = np.log(probs), np.log(tails)
        column = np.arange(self.counts.max(initial=1))
        starts = np.cumsum(self.counts) - self.counts
        index = starts[:, None] + np.minimum(column, self.counts[:, None] - 1)
        padded = np.where(column < self.counts[:, None], log_probs[index], -np.inf)
        return TopKTargets(
            torch.from_numpy(self.ids[index]),
            torch.from_numpy(padded.astype(np.float32)),
            torch.from_numpy(log_tails.astype(np.float32)),
        )


def levels_of(probs: np.ndarray, num_levels: int) -> np.ndarray:
    """sqrt(probs) in units of 1 / num_levels: then every entry adds about as much to the KL by its rounding."""
    return np.rint(np.sqrt(probs.astype(np.float64)) * num_levels).astype(np.int64)


def encode(entries: Entries, vocab_size: int) -> bytes:
    """A record; what `decode` needs beside it are N and the vocabulary."""
    firsts = np.cumsum(entries.counts) - entries.counts
    gaps = np.diff(entries.ids, prepend=-1) - 1
    gaps[firsts] = entries.ids[firsts]
    planes = [
        *_planes(entries.counts, 1),
        *_planes(entries.tails, 2),
        *_planes(gaps, _id_width(vocab_size)),
        *_planes(entries.levels, 2),
    ]
    packed = [_deflate(plane) for plane in planes]
    return np.array([len(part) for part in packed], dtype="<u4").tobytes() + b"".join(packed)


def decode(record: bytes, num_rows: int, vocab_size: int) -> Entries:
    """The entries of a record of `num_rows` rows, exactly as they were encoded."""
    id_width = _id_width(vocab_size)
    num_planes = 1 + 2 + id_width + 2
    sizes = np.frombuffer(record, dtype="<u4", count=num_planes).astype(np.int64)
    starts = 4 * num_planes + np.cumsum(sizes) - sizes
    packed = [record[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    counts = _integers(packed[:1], num_rows)
    tails = _integers(packed[1:3], num_rows)
    total = int(counts.sum())
    gaps = _integers(packed[3 : 3 + id_width], total)
    levels = _integers(packed[3 + id_width :], total)
    steps = np.cumsum(gaps + 1)
    firsts = np.cumsum(counts) - counts
    before = np.where(firsts > 0, steps[firsts - 1], 0)
    return Entries(counts, steps - np.repeat(before, counts) - 1, levels, tails)


def _id_width(vocab_size: int) -> int:
    return max(1, (vocab_size.bit_length() + 7) // 8)


def _planes(values: np.ndarray, width: int) -> list[bytes]:
    """The `width` lowest bytes of every integer, lowest first."""
    table = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    return [table[:, byte].tobytes() for byte in range(width)]


def _integers(packed: Sequence[bytes], count: int) -> np.ndarray:
    total = np.zeros(count, dtype=np.int64)
    for byte, part in enumerate(packed):
        total += np.frombuffer(_inflate(part, count), dtype=np.uint8).astype(np.int64) << (8 * byte)
    return total


def _deflate(plane: bytes) -> bytes:
    packed = zlib.compress(plane, level=9, wbits=-15)
    return packed if len(packed) < len(plane) else plane


def _inflate(packed: bytes, size: int) -> bytes:
    # A plane that deflating would not shorten stands as it is.
    return packed if len(packed) == size else zlib.decompress(packed, wbits=-15, bufsize=max(1, size))
