"""Attention of long segments, and what is kept of masks."""

import pytest
import torch

from limbeck.engine import attention
from limbeck.engine.attention import attend


def random_states(length, heads=4, key_heads=2, size=8):
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(1, length, heads, size, generator=generator)
    key, value = (torch.randn(1, length, key_heads, size, generator=generator) for _ in range(2))
    past = tuple(torch.randn(key_heads, 7, size, generator=generator) for _ in range(2))
    return query, key, value, past


@pytest.mark.parametrize("window", [None, 5, 40])
def test_tiles_are_the_whole(monkeypatch, window):
    query, key, value, past = random_states(70)
    whole = attend(query, key, value, past, 0.3, window)
    monkeypatch.setattr(attention, "TILE_TOKENS", 16)
    torch.testing.assert_close(attend(query, key, value, past, 0.3, window), whole, rtol=1e-5, atol=1e-6)


def test_masks_of_many_lengths_do_not_add_up():
    for length in range(300, 340):
        attend(*random_states(length), 0.3)
    assert attention._large_mask.cache_info().currsize == 2
    small = attention._small_mask.cache_info().maxsize * attention.SMALL_TOKENS**2 * 4
    assert small <= 1 << 20
