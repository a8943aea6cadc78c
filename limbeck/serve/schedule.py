"""Who is served next: k-LPM, which takes the oldest request, then k - 1 times the one with the longest known prefix.

k = 1 is first come, first served; k without end is longest prefix match, which can starve a request whose prefix is
never in the cache. k = 2 keeps most of the reuse and bounds the wait: the n-th oldest is picked within 2 n picks.
Source: k-LPM, 2502.04677.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


def order(
    waiting: Sequence[Sequence[bytes]], is_cached: Callable[[bytes], bool], k: int | None, picked: int = 0
) -> Iterator[int]:
    """Indices of `waiting` in the order of service; take as many as there is room for.

    Args:
      waiting: in order of arrival, the keys of the blocks of each one's prefix.
      is_cached: whether a block is held. Those of requests picked before count as held, since they will be.
      k: see above; None for longest prefix match alone.
      picked: number of picks made before this call, so that turns go on from call to call.
    """
    left = list(range(len(waiting)))
    matched = [0] * len(waiting)
    soon: set[bytes] = set()
    while left:
        if k is not None and picked % k == 0:
            best = left[0]
        else:
            for index in left:
                keys = waiting[index]
                while matched[index] < len(keys) and (keys[matched[index]] in soon or is_cached(keys[matched[index]])):
                    matched[index] += 1
            best = max(left, key=lambda index: (matched[index], -index))
        left.remove(best)
        soon.update(waiting[best])
        picked += 1
        yield best
