"""A fault in one text ends that text alone: calls for several texts that can be made for fewer, and constraints that
may take their time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

from torch import Tensor

from limbeck.engine.jobs import Constraint
from limbeck.errors import LimbeckError

Key = TypeVar("Key")
Value = TypeVar("Value")
Failed = Callable[[Key, Exception], None]


def apart(
    keys: Sequence[Key], call: Callable[[Sequence[Key]], Mapping[Key, Value]], failed: Failed[Key] | None
) -> dict[Key, Value]:
    """What a call gives for some keys; where it fails, what it gives for each half, down to those it fails for alone.

    Args:
      keys: what is asked for.
      call: from keys to their values; may be made again after it has failed.
      failed: told of each key that has no value; None raises instead, at once.
    Returns: the values of the others.
    """
    if not keys:
        return {}
    try:
        return dict(call(keys))
    except Exception as error:  # whatever it is, it ends the text that caused it and no other
        if failed is None:
            raise
        if len(keys) == 1:
            failed(keys[0], error)
            return {}
    half = len(keys) // 2
    return apart(keys[:half], call, failed) | apart(keys[half:], call, failed)


def each(keys: Sequence[Key], call: Callable[[Key], Value], failed: Failed[Key] | None) -> dict[Key, Value]:
    """What a call gives for each key, for those it does not fail for; `failed` as in `apart`."""
    found: dict[Key, Value] = {}
    for key in keys:
        try:
            found[key] = call(key)
        except Exception as error:  # as above
            if failed is None:
                raise
            failed(key, error)
    return found


class Stalled(LimbeckError):
    """A text's next token took too long to constrain."""


class Watched:
    """A constraint whose masks are made in a thread of its own, each while the pass before it runs.

    So a text whose mask is late misses a turn, in which the others go on; after `most_seconds` it has stalled.
    """

    def __init__(self, constraint: Constraint, most_seconds: float) -> None:
        self._constraint, self._most_seconds = constraint, most_seconds
        self._orders: queue.SimpleQueue[Future[Tensor | None] | None] = queue.SimpleQueue()
        self._mask: Future[Tensor | None] | None = None
        self.is_complete = False
        """Whether nothing but the end may follow the last token."""
        self._asked_at = 0.0
        # A daemon: one that never answers must not keep the process.
        self._thread = threading.Thread(target=_make, args=(constraint, self._orders), daemon=True)

    def is_ready(self, patience_seconds: float) -> bool:
        """Whether the next token's mask is there, or is within so long. Raises: Stalled."""
        self._ask()
        assert self._mask is not None
        try:
            self._mask.exception(patience_seconds)
        except TimeoutError:
            if time.monotonic() - self._asked_at > self._most_seconds:
                raise Stalled(f"the next token took longer than {self._most_seconds:g} s to constrain") from None
            return False
        return True

    def allowed(self) -> Tensor | None:
        """bool [V]; see `Constraint`. Raises: Stalled."""
        while not self.is_ready(self._most_seconds):
            pass
        assert self._mask is not None
        return self._mask.result()

    def accept(self, token: int) -> None:
        """Go on by a token, and begin with the mask behind it."""
        self._mask = None
        self._constraint.accept(token)
        self.is_complete = self._constraint.is_complete
        if not self.is_complete:
            self._ask()  # from here on the constraint is the thread's

    def close(self) -> None:
        """End the thread once it has answered."""
        self._orders.put(None)

    def _ask(self) -> None:
        if self._mask is None:
            if self._thread.ident is None:
                self._thread.start()
            self._mask, self._asked_at = Future(), time.monotonic()
            self._orders.put(self._mask)


def _make(constraint: Constraint, orders: queue.SimpleQueue[Future[Tensor | None] | None]) -> None:
    while (mask := orders.get()) is not None:
        try:
            mask.set_result(constraint.allowed())
        except Exception as error:
            mask.set_exception(error)
