"""A key-value cache that grows in place and whose rows can be gathered, behind transformers' Cache interface.

transformers' own dynamic layer concatenates, that is, copies everything so far for every new token; on CPU that costs
several times the attention itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

SPARE_COLUMNS = 64
"""Least room for new tokens behind a new buffer; a quarter of the columns when that is more."""


class Source(NamedTuple):
    """Rows of a cache to take over."""

    cache: Cache
    rows: Tensor
    """int64 indices, repeats allowed."""
    columns: int
    """How many of the last columns to take."""


def empty_cache() -> Cache:
    """A cache without columns, for any number of layers."""
    return Cache(layer_class_to_replicate=RoomyLayer)


def gather_rows(sources: Sequence[Source]) -> Cache:
    """A new cache with the rows of all sources behind one another, their columns aligned at the right edge."""
    width = max(source.columns for source in sources)
    layers = []
    for index in range(len(sources[0].cache)):
        states = [
            (_aligned(layer.keys, source, width), _aligned(layer.values, source, width))
            for source in sources
            for layer in (source.cache.layers[index],)
        ]
        layers.append(RoomyLayer())
        layers[-1].update(torch.cat([keys for keys, _ in states]), torch.cat([values for _, values in states]))
    return Cache(layers=layers)


class RoomyLayer(DynamicLayer):
    """Keys and values [R N_kv columns H] at the front of larger buffers, so that a step writes one column in place."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append new columns; returns views of all columns so far."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.key_buffer is None or self.value_buffer is None or end > self.key_buffer.shape[-2]:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.key_buffer = _with_room(self.key_buffer, key_states, start, end)
            self.value_buffer = _with_room(self.value_buffer, value_states, start, end)
        self.key_buffer[:, :, start:end] = key_states
        self.value_buffer[:, :, start:end] = value_states
        self.keys: Tensor | None = self.key_buffer[:, :, :end]
        self.values: Tensor | None = self.value_buffer[:, :, :end]
        return self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]


def _with_room(old: Tensor | None, like: Tensor, used: int, columns: int) -> Tensor:
    rows, heads, _, size = like.shape
    buffer = like.new_empty(rows, heads, columns + max(SPARE_COLUMNS, columns // 4), size)
    if old is not None:
        buffer[:, :, :used] = old[:, :, :used]
    return buffer


def _aligned(states: Tensor, source: Source, width: int) -> Tensor:
    # Padding is zeros: a masked column has weight 0, and 0 times a stray NaN would be NaN.
    taken = states[:, :, states.shape[-2] - source.columns :][source.rows]
    return nn.functional.pad(taken, (0, 0, width - source.columns, 0))
