"""SIGTERM, which schedulers send some time before they kill a job."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def asked_to_end() -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGTERM is only noted: the block asks whether it came, and ends when it is ready.

    A second one ends the process as always. Outside of the main thread, which alone gets signals, nothing is noted.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, _: object) -> None:
        came.append(number)
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
