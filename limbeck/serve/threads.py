"""Work beside the event loop: what is soon done does not wait for what is large."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

LARGE_BYTES = 64 << 10
"""Of what is read, written or tokenised."""

Result = TypeVar("Result")
Order = tuple[Future[Any], Callable[[], Any]]


class Pool:
    """Daemon threads: one that is still at work must not keep a process that ends, as `concurrent.futures` would."""

    def __init__(self, threads: int, name: str) -> None:
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    async def run(self, function: Callable[[], Result]) -> Result:
        """Call a function in a thread; one that is cancelled before is not called."""
        future: Future[Result] = Future()
        self._orders.put((future, function))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Begin nothing more."""
        with contextlib.suppress(queue.Empty):
            while (order := self._orders.get_nowait()) is not None:
                order[0].cancel()
        for _ in self._threads:
            self._orders.put(None)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            future, function = order
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)


class Threads:
    """Of one server."""

    def __init__(self) -> None:
        self._small, self._large = Pool(4, "small"), Pool(1, "large")

    async def run(self, size: int, function: Callable[[], Result]) -> Result:
        """Call a function with work of so many bytes or characters in a thread."""
        return await (self._small if size < LARGE_BYTES else self._large).run(function)

    def close(self) -> None:
        """Begin nothing more."""
        self._small.close()
        self._large.close()
