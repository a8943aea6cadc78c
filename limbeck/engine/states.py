"""Keys and values of texts, and the pieces of texts that a pass takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from limbeck.errors import ModelError


class StateShape(Protocol):
    """What room a decoder needs for a token."""

    layers: int
    key_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device


class KeyValues:
    """Keys and values of a text, [L N_kv P H] each, filled from the front; or of what follows a beginning that others
    may share."""

    def __init__(self, decoder: StateShape, tokens: int, before: KeyValues | None = None) -> None:
        """`tokens`: room, behind those of `before`, which is full."""
        shape = (decoder.layers, decoder.key_heads, tokens, decoder.head_size)
        self.keys, self.values = (torch.empty(shape, dtype=decoder.dtype, device=decoder.device) for _ in range(2))
        self.before = before
        self.start = 0 if before is None else before.keys.shape[2]
        """Position of the first token here."""

    @property
    def room(self) -> int:
        """Tokens of the text that have a place, those before included."""
        return self.start + self.keys.shape[2]

    @functools.cached_property
    def place(self) -> tuple[int, ...]:
        """Addresses of keys and values and their room, of the text before and of what is here; and `start`."""
        before = (0, 0, 0) if self.before is None else self.before.place[3:6]
        return (*before, self.keys.data_ptr(), self.values.data_ptr(), self.keys.shape[2], self.start)

    def past(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values [N_kv length H] of a layer."""
        return self.keys[layer, :, :length], self.values[layer, :, :length]

    def put(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Take over keys and values [L N_kv n H] of the tokens from `start` on."""
        stop = start + keys.shape[2]
        self.keys[:, :, start:stop], self.values[:, :, start:stop] = keys, values

    def cut(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A copy of the keys and values [L N_kv n H] of some tokens."""
        here = slice(max(start - self.start, 0), max(stop - self.start, 0))
        keys, values = self.keys[:, :, here].clone(), self.values[:, :, here].clone()
        if self.before is None or start >= self.start:
            return keys, values
        earlier = self.before.cut(start, min(stop, self.start))
        return torch.cat([earlier[0], keys], 2), torch.cat([earlier[1], values], 2)


class Segment(NamedTuple):
    """Tokens that follow the first `start` tokens of a prefix."""

    tokens: Sequence[int]
    """At least one."""
    prefix: Any = None
    """`KeyValues`, or what else the back end keeps of a text; None where nothing is before it."""
    start: int = 0
    """Position of the first token, and how many keys of the prefix it sees."""
    grows: bool = False
    """Whether its keys and values are written into the prefix, from `start` on."""


def check_segment(segment: Segment, max_tokens: int, embeddings: int) -> None:
    """Refuse what cannot be computed.

    Args:
      max_tokens: longest text; embeddings: ids that a text may hold.
    Raises: ModelError.
    """
    end = segment.start + len(segment.tokens)
    if not len(segment.tokens):
        raise ModelError("a segment without tokens; there is nothing to compute.")
    if end > max_tokens:
        raise ModelError(f"a prompt of {end} tokens; the limit is {max_tokens}.")
    check_ids(segment.tokens, embeddings)


def check_ids(tokens: Sequence[int], embeddings: int) -> None:
    """Raises: ModelError where one of the ids, one at least, is none of a model with so many."""
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= embeddings:
        raise ModelError(f"token ids {low} to {high}; the model has 0 to {embeddings - 1}.")
