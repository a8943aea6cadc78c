"""Tokens to text while they come: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

HALF = "�"
"""What a decoder writes for bytes that are no character, or not one yet."""
PATIENCE_TOKENS = 16
"""Bytes that are still no character after so many tokens never become one: the longest has four."""


class Detokenizer:
    """What each token adds to the text; all pieces together are the text of all tokens.

    A window of tokens is decoded with and without the newest one, since a token's text can depend on those before it
    (a space in front, the bytes of one character).
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        """`before`: the last tokens of the prompt that the text goes on from."""
        self._decode = decode
        self._window = list(before)
        self._told = len(decode(self._window).rstrip(HALF)) if before else 0
        """Characters of the window that have been given out."""
        self._pending = 0

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._window.append(token)
        self._pending += 1
        text = self._decode(self._window)
        if text.endswith(HALF) and self._pending < PATIENCE_TOKENS:
            return ""
        new = text[self._told :]
        # What has been told stays in the window one round longer, as the context of what follows.
        self._window = self._window[-self._pending :]
        self._told, self._pending = len(self._decode(self._window)), 0
        return new

    def finish(self) -> str:
        """What was held back."""
        new = self._decode(self._window)[self._told :] if self._pending else ""
        self._pending = 0
        return new


class StopStrings:
    """Passes text on up to the first stop string, which is left out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._begun = {stop: 0 for stop in stops if stop}
        """By stop string, how much of it the text ends with."""
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def add(self, text: str) -> str:
        """The text that can be in no stop string any more."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._begun if stop in self._held]
        if places:
            end, self.found = min(places)
            keep = 0
        else:
            # No more than before and what has come since: so all texts together are looked through about once.
            self._begun = {stop: overlap(self._held, stop, n + len(text)) for stop, n in self._begun.items()}
            keep = max(self._begun.values(), default=0)
            end = len(self._held) - keep
        passed, self._held = self._held[:end], self._held[len(self._held) - keep :]
        return passed

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return "" if self.found is not None else held


def overlap(text: str, marker: str, most: int | None = None) -> int:
    """How many characters of the marker's beginning the text ends with; less than all of it, `most` where known."""
    lengths = range(min(len(text), len(marker) - 1, len(marker) if most is None else most), 0, -1)
    return next((length for length in lengths if text.endswith(marker[:length])), 0)
