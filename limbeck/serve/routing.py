"""Which replica takes a request: the one that has its beginning in the cache, unless it is much busier than another.

Beginnings are known by hashes of everything up to the end of each piece of the text, as in the prefix cache below. What
a replica was sent is remembered for as many pieces as about fit into its cache.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import pydantic_core

PIECE_CHARACTERS = 128
MOST_PIECES = 256
"""Of one request: beyond that, beginnings that are equal so far stay together anyway."""
REMEMBERED = 100_000
SLACK = 4
"""Requests by which a replica may be busier than the least busy one and still get what it knows."""


class Routes:
    """What each replica was sent, and what it has under way."""

    def __init__(self, replicas: int) -> None:
        self.under_way = [0] * replicas
        self._known: OrderedDict[bytes, int] = OrderedDict()
        """Replica by piece; the piece seen last at the end."""

    def choose(self, text: str, alive: Iterable[int]) -> int:
        """The replica for a request that begins with `text`; it is remembered there.

        Args:
          alive: replicas that answer, at least one.
        """
        free = sorted(alive, key=lambda replica: (self.under_way[replica], replica))
        keys = pieces(text)
        known = next((self._known[key] for key in reversed(keys) if self._known.get(key) in free), free[0])
        is_busy = self.under_way[known] > self.under_way[free[0]] + SLACK
        chosen = free[0] if is_busy else known
        for key in keys:
            self._known[key] = chosen
            self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return chosen


def pieces(text: str) -> list[bytes]:
    """Keys of a text's beginnings, the shortest first; a last piece that is not whole has none."""
    keys: list[bytes] = []
    for start in range(0, min(len(text), PIECE_CHARACTERS * MOST_PIECES), PIECE_CHARACTERS):
        piece = text[start : start + PIECE_CHARACTERS]
        if len(piece) < PIECE_CHARACTERS and keys:
            break
        data = (keys[-1] if keys else b"") + piece.encode("utf-8", "replace")
        keys.append(hashlib.blake2b(data, digest_size=16).digest())
    return keys


def beginning_of(body: bytes, most_values: int) -> str:
    """What the prompt of a request begins with, by its body; empty for one that no replica would read."""
    if body.count(b",") + 2 * (body.count(b"[") + body.count(b"{")) > most_values:
        return ""
    try:
        return beginning(pydantic_core.from_json(body))
    except ValueError:
        return ""  # the replica says what is wrong with it


def beginning(body: Any) -> str:
    """What the prompt of a request begins with, by the fields that prompts stand in; empty for what has none."""
    if not isinstance(body, dict):
        return ""
    if isinstance(body.get("messages"), list):
        return "".join(
            f"{_text(turn.get('role'))}\n{_text(turn.get('content'))}\n" for turn in _objects(body["messages"])
        )
    for name in ("query", "prompt", "input", "text_1", "data_1", "queries"):
        if name in body:
            return _text(body[name])
    return ""


def _objects(turns: list[Any]) -> list[dict[str, Any]]:
    return [turn for turn in turns if isinstance(turn, dict)]


def _text(value: Any) -> str:
    """Of a text, of token ids, or of the first of several."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if isinstance(value[0], int):
            return " ".join(map(str, value[: PIECE_CHARACTERS * MOST_PIECES // 2]))
        return _text(value[0]) if not isinstance(value[0], dict) else _text(value[0].get("text"))
    return ""
