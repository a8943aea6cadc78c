"""The prefix cache: what is found, what goes first, what never goes, and the budget."""

import random

import pytest
import torch

from limbeck.engine.prefix_cache import Block, PrefixCache

TOKEN_BYTES = 2 * 4 * 2


def put(cache, tokens):
    """Put a prefix in as a scorer does; returns its chain, in use."""
    chain = cache.acquire(tokens)
    keys, spans = cache.keys_of(tokens), cache.spans(len(tokens))
    for key, (start, stop) in list(zip(keys, spans, strict=True))[len(chain) :]:
        states = torch.tensor(tokens[start:stop], dtype=torch.float32).view(1, 1, -1, 1).expand(1, 1, -1, 2).clone()
        parent = chain[-1] if chain else None
        block = cache.insert(Block(key=key, parent=parent, keys=states, values=states, last_hidden=torch.zeros(0)))
        if block is None:
            break
        chain.append(block)
    return chain


def found(cache, tokens):
    """How many tokens of a prefix are there."""
    chain = cache.acquire(tokens)
    cache.release(chain)
    return sum(block.length for block in chain)


def test_finds_the_longest_common_beginning():
    cache = PrefixCache(10_000, 4, "model")
    cache.release(put(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
    assert found(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == 10
    assert found(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]) == 8  # the short last block is another one
    assert found(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]) == 8
    assert found(cache, [1, 2, 3, 4, 5, 6, 7]) == 4
    assert found(cache, [0, 2, 3, 4, 5, 6, 7, 8]) == 0  # the same second block behind another first one
    assert found(cache, []) == 0
    assert cache.stats().used_bytes == 10 * TOKEN_BYTES


def test_models_and_block_sizes_have_keys_of_their_own():
    keys = [PrefixCache(1, size, model).keys_of([1, 2, 3])[0] for size, model in [(4, "a"), (4, "b"), (8, "a")]]
    assert len(set(keys)) == 3


def test_oldest_goes_first_and_the_end_before_its_beginning():
    cache = PrefixCache(4 * 4 * TOKEN_BYTES, 4, "model")
    old, new = [1] * 8, [2] * 8
    cache.release(put(cache, old))
    cache.release(put(cache, new))
    cache.release(put(cache, [3] * 4))
    assert (found(cache, old), found(cache, new), found(cache, [3] * 4)) == (4, 8, 4)
    assert found(cache, old) == 4  # used now, so that the end of the other one goes
    cache.release(put(cache, [4] * 4))
    assert (found(cache, old), found(cache, new), found(cache, [3] * 4)) == (4, 4, 4)


def test_what_is_in_use_stays_and_the_rest_is_refused():
    cache = PrefixCache(2 * 4 * TOKEN_BYTES, 4, "model")
    chain = put(cache, [1] * 8)
    assert put(cache, [2] * 4) == []
    assert cache.stats().refused_blocks == 1
    cache.release(chain)
    other = put(cache, [2] * 4)
    assert len(other) == 1 and found(cache, [1] * 8) == 4
    cache.release(other)
    with pytest.raises(AssertionError, match="released more often"):
        cache.release(other)
    assert PrefixCache(8, 4, "model").insert(other[0]) is None


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic(seed):
    """Against the plain facts: contents right, chains whole, bytes counted and bounded, users never thrown out."""
    generator = random.Random(seed)
    cache = PrefixCache(12 * 4 * TOKEN_BYTES, 4, "model")
    held: list[list[Block]] = []
    for _ in range(1500):
        if held and generator.random() < 0.5:
            cache.release(held.pop(generator.randrange(len(held))))
        else:
            tokens = [generator.randrange(2) for _ in range(generator.randrange(1, 20))]
            chain = put(cache, tokens)
            stored = [int(t) for block in chain for t in block.keys[0, 0, :, 0]]
            assert stored == tokens[: len(stored)]
            if len(held) < 4:
                held.append(chain)
            else:
                cache.release(chain)
        blocks = cache._blocks
        users: dict[int, int] = {}
        for block in (block for chain in held for block in chain):
            users[id(block)] = users.get(id(block), 0) + 1
        assert all(blocks[block.key] is block for chain in held for block in chain)
        assert all(block.users == users.get(id(block), 0) for block in blocks.values())
        assert all(block.parent is None or blocks[block.parent.key] is block.parent for block in blocks.values())
        assert (
            cache.stats().used_bytes == sum(block.size_bytes for block in blocks.values()) <= cache.budget.total_bytes
        )
        assert len(cache._idle) <= 2 * len(blocks) + 65
    for chain in held:
        cache.release(chain)
    # Nothing is left behind that could not go: a prefix as large as the cache finds room.
    whole = put(cache, [9] * 48)
    assert len(whole) == 12 and cache.stats().blocks == 12
    assert cache.stats().evicted_blocks > 100 and cache.stats().hit_tokens > 0
