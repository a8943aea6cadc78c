"""A key-value cache that grows in place and whose rows can be gathered, behind transformers' Cache interface.

transformers' own dynamic layer concatenates, that is, copies everything so far for every new token; on CPU that costs
several times the attention itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
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
        old = [source.cache.layers[index] for source in sources]
        layers.append(RoomyLayer())
        layers[-1].adopt(
            _gathered([layer.keys for layer in old], sources, width),
            _gathered([layer.values for layer in old], sources, width),
            width,
        )
    return Cache(layers=layers)


def shrink(cache: Cache, holes: Sequence[int], movers: Sequence[int], rows: int, columns: int) -> None:
    """Keep the first `rows` rows of a cache made here, without its first `columns` columns; only moved rows are copied.

    Args:
      holes: rows to be overwritten; movers: the rows that take their places.
    """
    for layer in cache.layers:
        assert isinstance(layer, RoomyLayer)
        layer.shrink(holes, movers, rows, columns)


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
        keys, values = self.key_buffer, self.value_buffer
        if keys is None or values is None or end > keys.shape[-2]:
            keys, values = _with_room(keys, key_states, start, end), _with_room(values, value_states, start, end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return self.adopt(keys, values, end)

    def shrink(self, holes: Sequence[int], movers: Sequence[int], rows: int, columns: int) -> None:
        """As the function of this name, for one layer. Both buffers become views of what they were."""
        assert self.key_buffer is not None and self.value_buffer is not None
        end = self.get_seq_length()
        for buffer in (self.key_buffer, self.value_buffer) if holes else ():
            buffer[holes, :, columns:end] = buffer[movers, :, columns:end]
        self.adopt(self.key_buffer[:rows, :, columns:], self.value_buffer[:rows, :, columns:], end - columns)

    def adopt(self, key_buffer: Tensor, value_buffer: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Take these buffers, of which so many columns are in use; returns views of these."""
        self.dtype, self.device, self.is_initialized = key_buffer.dtype, key_buffer.device, True
        self.key_buffer, self.value_buffer = key_buffer, value_buffer
        self.keys, self.values = key_buffer[:, :, :columns], value_buffer[:, :, :columns]
        return self.keys, self.values


def _with_room(old: Tensor | None, like: Tensor, used: int, columns: int) -> Tensor:
    rows, heads, _, size = like.shape
    buffer = like.new_empty(rows, heads, columns + _room(columns), size)
    if old is not None:
        buffer[:, :, :used] = old[:, :, :used]
    return buffer


def _gathered(states: Sequence[Tensor], sources: Sequence[Source], width: int) -> Tensor:
    # Padding is zeros: a masked column has weight 0, and 0 times a stray NaN would be NaN.
    _, heads, _, size = states[0].shape
    rows = sum(len(source.rows) for source in sources)
    buffer = states[0].new_zeros(rows, heads, width + _room(width), size)
    start = 0
    for taken, (_, chosen, columns) in zip(states, sources, strict=True):
        target = buffer[start : start + len(chosen), :, width - columns : width]
        target.copy_(taken[:, :, taken.shape[-2] - columns :].index_select(0, chosen))
        start += len(chosen)
    return buffer


def _room(columns: int) -> int:
    return max(SPARE_COLUMNS, columns // 4)
