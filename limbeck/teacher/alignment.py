"""Two token sequences of the same bytes, laid beside one another."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Spans(NamedTuple):
    """For each token of one sequence, the tokens of the other that its bytes lie in; -1 everywhere without any."""

    first: np.ndarray
    """int [T]: the token that holds its first byte."""
    last: np.ndarray
    """int [T]: the token that holds its last byte."""
    skipped: np.ndarray
    """int [T]: bytes of token `first` that stand before it; 0 where both begin at the same byte."""


def align(lengths: np.ndarray, other_lengths: np.ndarray, num_bytes: int) -> Spans:
    """Lay the tokens of one sequence beside those of another.

    Args:
      lengths: int [T], bytes of each token.
      other_lengths: int [U], the same of the other sequence.
      num_bytes: how many bytes from the first on are the same; tokens that reach beyond them have no span, and neither
        have tokens without bytes.

    Example:
        align(np.array([2, 2]), np.array([1, 3]), 4)  # "12|34" beside "1|234": first 0, 1; last 1, 1; skipped 0, 1
    """
    ends, other_ends = np.cumsum(lengths), np.cumsum(other_lengths)
    starts, other_starts = ends - lengths, other_ends - other_lengths
    has_span = (lengths > 0) & (ends <= min(num_bytes, int(other_lengths.sum())))
    first = np.where(has_span, np.searchsorted(other_ends, starts, side="right"), -1)
    last = np.where(has_span, np.searchsorted(other_ends, ends, side="left"), -1)
    skipped = np.where(has_span, starts - other_starts[first], -1) if len(other_starts) else first
    return Spans(first, last, skipped)


def num_shared_bytes(one: bytes, other: bytes) -> int:
    """Bytes that both begin with."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(np.frombuffer(one, np.uint8, length) != np.frombuffer(other, np.uint8, length))
    return int(differing[0]) if len(differing) else length
