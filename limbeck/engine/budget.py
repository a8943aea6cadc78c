"""A number of bytes that several keepers share: whoever needs room has the oldest thing of all of them released."""

from __future__ import annotations

import itertools
import threading
from typing import Protocol

from limbeck.errors import ConfigError


class Keeper(Protocol):
    """Keeps what may be made again: blocks of prefixes, compiled forms."""

    def oldest(self) -> int | None:
        """When what goes next was used last, by the budget's `now`; None where all is in use."""

    def release_oldest(self) -> None:
        """Let it go, and give its bytes back."""


class Budget:
    """Bytes of one server, or of one keeper alone. Threads may share it."""

    def __init__(self, total_bytes: int, name: str = "the budget") -> None:
        """`name`: of the setting, for errors."""
        self.total_bytes, self.name = total_bytes, name
        self.used_bytes = 0
        self.lock = threading.RLock()
        """Held by keepers while they change what they keep, since any thread may have them release it."""
        self._keepers: list[Keeper] = []
        self._clock = itertools.count(1)

    def join(self, keeper: Keeper) -> None:
        """From now on the keeper is asked for its oldest."""
        self._keepers.append(keeper)

    def check(self, size_bytes: int, what: str) -> None:
        """Raises: ConfigError for what could never be taken."""
        if size_bytes > self.total_bytes:
            raise ConfigError(
                f"{what} {size_bytes} bytes; {self.name} is {self.total_bytes}. Ask for less, or raise it."
            )

    def now(self) -> int:
        """A number that grows with every call."""
        return next(self._clock)

    def take(self, size_bytes: int) -> bool:
        """Take so many bytes, until `give_back`. Returns: False where what is in use leaves no room for them."""
        with self.lock:
            if size_bytes > self.total_bytes:
                return False
            while self.used_bytes + size_bytes > self.total_bytes:
                times = [(time, keeper) for keeper in self._keepers if (time := keeper.oldest()) is not None]
                if not times:
                    return False
                min(times, key=lambda pair: pair[0])[1].release_oldest()
            self.used_bytes += size_bytes
            return True

    def give_back(self, size_bytes: int) -> None:
        """End a use of them."""
        with self.lock:
            self.used_bytes -= size_bytes
