"""Which passes score a batch, and the choice between the ways by a cost model.

    single   a pass an item over prefix and item; nothing is shared or kept
    cached   a pass for what is missing of the prefix, then a pass an item
    shared   a pass for what is missing of the prefix, then items side by side
    packed   prefix and items side by side from the first pass on

A pass of R tokens costs what one of so many was measured to cost, plus attention: a query token times its keys. Larger
passes read the weights less often, smaller ones keep their activations in the processor's cache; where the best size
lies is measured, not assumed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from limbeck.engine.backend import Backend
from limbeck.engine.states import Segment
from limbeck.errors import ConfigError, nearest

PROBED_ROWS = (1, 16, 64, 256, 1024)
PROBED_LENGTH = 16
PROBED_KEYS = 512


class Costs(NamedTuple):
    """Seconds of this decoder on this machine."""

    rows: tuple[int, ...]
    """Tokens in a pass, increasing."""
    seconds: tuple[float, ...]
    """Of such a pass, its attention to a prefix apart."""
    key_seconds: float
    """Of one query token and one key, in all layers."""

    def of_pass(self, rows: int, products: int) -> float:
        """Seconds of a pass with so many tokens and so many pairs of query token and key.

        Between measured sizes on a straight line; beyond the largest, in proportion to it.
        """
        if rows > self.rows[-1]:
            linear = self.seconds[-1] * rows / self.rows[-1]
        else:
            linear = float(np.interp(rows, self.rows, self.seconds))
        return linear + products * self.key_seconds


def measure_costs(decoder: Backend, repeats: int = 2) -> Costs:
    """Time a few passes; of those that are soon done, the fastest of `repeats`.

    Without blocks nothing can be shared, and every way costs the same.
    """
    if not decoder.has_blocks:
        return Costs((PROBED_ROWS[-1],), (1.0,), 0.0)
    seconds = []
    for rows in PROBED_ROWS:
        length = min(rows, PROBED_LENGTH)
        segments = [Segment([0] * length) for _ in range(rows // length)]
        seconds.append(_fastest(functools.partial(decoder.run, segments), repeats if rows < 256 else 1))
    keys = min(PROBED_KEYS, decoder.max_tokens - PROBED_LENGTH)
    prefix = decoder.states(keys)
    prefix.keys.zero_()
    prefix.values.zero_()
    count = 64 // PROBED_LENGTH
    behind = [Segment([0] * PROBED_LENGTH, prefix, keys) for _ in range(count)]
    extra = _fastest(lambda: decoder.run(behind), repeats) - seconds[PROBED_ROWS.index(64)]
    return Costs(PROBED_ROWS, tuple(np.maximum.accumulate(seconds).tolist()), max(extra, 0.0) / (64 * keys))


def _fastest(call: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


class PrefixAndItems(NamedTuple):
    """One prefix and all items behind it."""

    spans: list[tuple[int, int]]
    """Blocks of the prefix, from its start."""
    cached: int
    """How many of them are there already."""
    items: list[int]
    """Tokens of each item."""


class Piece(NamedTuple):
    """A block of a prefix, or an item, in a pass."""

    work: int
    span: tuple[int, int]
    """Positions it covers."""
    item: int | None
    """None for a block of the prefix."""


class Plan(NamedTuple):
    """Passes in order."""

    path: str
    passes: list[list[Piece]]
    seconds: float
    """By the cost model."""


def single(works: Sequence[PrefixAndItems], pass_tokens: int) -> Iterator[list[Piece]]:
    """A pass an item, its prefix before it; `pass_tokens` does not bind."""
    for number, work in enumerate(works):
        blocks = _blocks(number, work, 0)
        for item in _items(number, work, with_empty=True):
            yield blocks + ([item] if item.span[0] < item.span[1] else [])


def cached(works: Sequence[PrefixAndItems], pass_tokens: int) -> Iterator[list[Piece]]:
    """The prefixes, then a pass an item."""
    for number, work in enumerate(works):
        yield from _filled(_blocks(number, work, work.cached), pass_tokens)
        for item in _items(number, work):
            yield [item]


def shared(works: Sequence[PrefixAndItems], pass_tokens: int) -> Iterator[list[Piece]]:
    """The prefixes, then the items."""
    yield from _filled([b for n, work in enumerate(works) for b in _blocks(n, work, work.cached)], pass_tokens)
    yield from _filled([item for n, work in enumerate(works) for item in _items(n, work)], pass_tokens)


def packed(works: Sequence[PrefixAndItems], pass_tokens: int) -> Iterator[list[Piece]]:
    """Prefixes, each with its items behind it."""
    pieces = [p for n, work in enumerate(works) for p in (*_blocks(n, work, work.cached), *_items(n, work))]
    yield from _filled(pieces, pass_tokens)


PATHS: dict[str, Callable[[Sequence[PrefixAndItems], int], Iterator[list[Piece]]]] = {
    "single": single,
    "cached": cached,
    "shared": shared,
    "packed": packed,
}


def make_plan(
    works: Sequence[PrefixAndItems], costs: Costs, path: str = "auto", pass_tokens: int | None = None
) -> Plan:
    """The cheapest passes by the cost model.

    Args:
      works: what is to be computed.
      path: one of `PATHS`, or auto for any but `single`, which is never cheaper and leaves nothing for the next call.
      pass_tokens: most tokens of a pass (one block or item may be longer); None to choose among the measured sizes.
    Raises: ConfigError for an unknown path.
    """
    if path != "auto" and path not in PATHS:
        raise ConfigError(f"path {path!r} is unknown; {nearest(path, ['auto', *PATHS])}")
    names = ("packed", "shared", "cached") if path == "auto" else (path,)
    measured = [size for size in costs.rows if size >= 64] or [costs.rows[-1]]
    sizes = measured if pass_tokens is None else [pass_tokens]
    plans = [_plan(name, works, size, costs) for name in names for size in sizes]
    return min(plans, key=lambda plan: plan.seconds)


def _plan(path: str, works: Sequence[PrefixAndItems], pass_tokens: int, costs: Costs) -> Plan:
    passes = list(PATHS[path](works, pass_tokens))
    return Plan(path, passes, sum(_seconds(pieces, costs) for pieces in passes))


def _seconds(pieces: Sequence[Piece], costs: Costs) -> float:
    lengths = [stop - start for _, (start, stop), _ in pieces]
    return costs.of_pass(sum(lengths), sum(n * piece.span[1] for n, piece in zip(lengths, pieces, strict=True)))


def _blocks(number: int, work: PrefixAndItems, first: int) -> list[Piece]:
    return [Piece(number, span, None) for span in work.spans[first:]]


def _items(number: int, work: PrefixAndItems, with_empty: bool = False) -> list[Piece]:
    end = work.spans[-1][1] if work.spans else 0
    return [Piece(number, (end, end + length), item) for item, length in enumerate(work.items) if length or with_empty]


def _filled(pieces: Sequence[Piece], pass_tokens: int) -> Iterator[list[Piece]]:
    """Pieces in order, as many a pass as fit."""
    current: list[Piece] = []
    rows = 0
    for piece in pieces:
        length = piece.span[1] - piece.span[0]
        if current and rows + length > pass_tokens:
            yield current
            current, rows = [], 0
        current.append(piece)
        rows += length
    if current:
        yield current
