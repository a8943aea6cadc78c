"""Where to cut traces of different lengths, so that together they keep a share of their tokens. Pure functions.

A cut at a share of each trace's own length sees late places of long traces only, and no end of a short one. Two cuts
that do not censor by length spend the same tokens otherwise:

    common length    all traces end at one N, the largest with sum_i min(L_i, N) <= budget     (type I censoring)
    random horizon   a trace ends at a random place with P(T > t) = S(t) = min(1, N / t); the token at t weighs 1 / S(t)

With those weights the expected loss is that of the whole traces: E[sum_{t < T} l_t / S(t)] = sum_t l_t (Horvitz and
Thompson, 1952). The tail N / t is the heaviest whose weights, t / N, stay in proportion to the place. Clipped weights
are biased towards the beginning, and vary less. Own methods; none was found for traces.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

DRAWS = 1 << 64
"""Whole numbers below it are what a draw may be."""


def common_length(lengths: np.ndarray, budget: int) -> int:
    """The largest N >= 1 with sum_i min(L_i, N) <= budget; 1 where even that is more.

    Args:
      lengths: int [n], tokens of each trace, at least one above 0.
      budget: tokens that may be kept.

    >>> common_length(np.array([2, 4, 10]), 8)
    3
    """
    return _largest(lambda n: bool(np.minimum(lengths, n).sum() <= budget), int(lengths.max()))


def horizon_scale(lengths: np.ndarray, budget: int) -> int:
    """The largest N >= 1 at which random horizons of scale N keep `budget` tokens or fewer in the mean.

    Arguments as for `common_length`.
    """
    longest = int(lengths.max())
    reached = len(lengths) - np.searchsorted(np.sort(lengths), np.arange(longest), side="right")
    return _largest(lambda n: float(reached @ survival(longest, n)) <= budget * (1 + 1e-12), longest)


def survival(length: int, scale: int) -> np.ndarray:
    """S(t) = min(1, N / t) of the tokens t = 0, 1, ... before `length`: float64 [length]."""
    return np.minimum(1.0, scale / np.maximum(1, np.arange(length)))


def horizon(draw: int, scale: int) -> int:
    """Tokens that a trace keeps, ceil(N / u) with u = (draw + 1) / 2^64: P(kept > t) = S(t), for t in whole tokens.

    Args:
      draw: a whole number in [0, 2^64), uniform.
      scale: N.
    """
    return -(-scale * DRAWS // (draw + 1))


def horizon_weights(length: int, scale: int, limit: float | None = None) -> np.ndarray:
    """1 / S(t) of the first tokens, at most `limit`: float32 [length]."""
    return np.minimum(1.0 / survival(length, scale), math.inf if limit is None else limit).astype(np.float32)


def _largest(fits: Callable[[int], bool], longest: int) -> int:
    low, high = 1, longest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
