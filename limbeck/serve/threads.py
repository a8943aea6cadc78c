"""Work beside the event loop: what is soon done does not wait for what is large."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

LARGE_BYTES = 64 << 10
"""Of what is read, written or tokenised."""

Result = TypeVar("Result")


class Threads:
    """Of one server."""

    def __init__(self) -> None:
        self._small, self._large = ThreadPoolExecutor(4, "small"), ThreadPoolExecutor(1, "large")

    async def run(self, size: int, function: Callable[[], Result]) -> Result:
        """Call a function with work of so many bytes or characters in a thread."""
        pool = self._small if size < LARGE_BYTES else self._large
        return await asyncio.get_running_loop().run_in_executor(pool, function)

    def close(self) -> None:
        """Begin nothing more."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)
