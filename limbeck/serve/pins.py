"""Prefixes that were sent ahead, each kept in the cache for its time."""

from __future__ import annotations

import time
from typing import NamedTuple

from limbeck.engine.scoring import Pin, Scorer
from limbeck.errors import ConfigError
from limbeck.serve.config import LimitsConfig
from limbeck.serve.ticket import Prefill, Refusal


class Held(NamedTuple):
    """A pinned prefix."""

    pin: Pin
    until: float


class Pins(dict[str, Held]):
    """By name. The engine's thread only."""

    def __init__(self, scorer: Scorer, limits: LimitsConfig) -> None:
        super().__init__()
        self._scorer, self._limits = scorer, limits

    def add(self, work: Prefill) -> int:
        """Compute a prefix and pin it. Returns: its tokens. Raises: Refusal where there is no room for it now."""
        try:
            if len(self) >= self._limits.pins:
                raise ConfigError(f"{len(self)} prefixes are pinned, which is the limit.")
            pin = self._scorer.prefill(work.tokens)
        except ConfigError as error:
            raise Refusal(429, str(error), self._limits.pin_seconds) from error
        self[work.pin] = Held(pin, time.monotonic() + self._limits.pin_seconds)
        return pin.tokens

    def release(self, name: str) -> None:
        """Let one go; one that has gone is no error."""
        held = self.pop(name, None)
        if held is not None:
            held.pin.release()

    def expire(self, now: float) -> None:
        """Let those go whose time is over."""
        for name in [name for name, held in self.items() if held.until <= now]:
            self.release(name)
