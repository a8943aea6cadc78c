"""Keys and values of prefixes in blocks, found by a hash of everything up to their end, in a bounded number of bytes.

A prefix is cut into blocks of `block_tokens` from its start; what is left over is a short last block. A block's key is
a hash of its parent's key and its own tokens, so that equal keys mean equal beginnings. A chain of blocks in use (by a
pass under way, or pinned for a request that is still to come) is never thrown out; of the others the one goes that was
used longest ago, and never before those behind it.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from limbeck.engine.budget import Budget


@dataclass(kw_only=True, slots=True, eq=False)
class Block:
    """The keys and values of up to `block_tokens` tokens."""

    key: bytes
    parent: Block | None
    keys: Tensor
    """[L N_kv block_tokens H], and `values`."""
    values: Tensor
    last_hidden: Tensor
    """[D]: state behind the final norm at the block's last token, for items without tokens."""
    users: int = 0
    children: int = 0
    used_at: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.keys, self.values, self.last_hidden))

    @property
    def length(self) -> int:
        return self.keys.shape[2]


class CacheStats(NamedTuple):
    """Counters since the start, and what is held now."""

    queried_tokens: int
    hit_tokens: int
    evicted_blocks: int
    refused_blocks: int
    """That found no room beside blocks in use."""
    blocks: int
    used_bytes: int


class PrefixCache:
    """Blocks by key. One thread at a time; others may have it release blocks, by the budget that they share with it."""

    def __init__(self, budget: Budget | int, block_tokens: int, model_key: str) -> None:
        """`budget`: bytes of its own, or shared ones."""
        self.budget = Budget(budget) if isinstance(budget, int) else budget
        self.budget.join(self)
        self.block_tokens = block_tokens
        self._root = hashlib.blake2b(f"{model_key}/{block_tokens}".encode(), digest_size=16).digest()
        self._blocks: dict[bytes, Block] = {}
        self._idle: list[tuple[int, int, Block]] = []
        """Heap of blocks that may go; entries whose block was used since are skipped."""
        self._ticket = itertools.count()
        self._used_bytes = self._queried = self._hits = self._evicted = self._refused = 0

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Where the blocks of a prefix of this length begin and end."""
        return [(start, min(start + self.block_tokens, length)) for start in range(0, length, self.block_tokens)]

    def keys_of(self, tokens: Sequence[int]) -> list[bytes]:
        """The keys of a prefix's blocks."""
        keys: list[bytes] = []
        for start, stop in self.spans(len(tokens)):
            keys.append(self.key_after(keys[-1] if keys else None, tokens[start:stop]))
        return keys

    def key_after(self, parent: bytes | None, tokens: Sequence[int]) -> bytes:
        """The key of a block with these tokens behind the block with that key, or at the start."""
        data = np.asarray(tokens, dtype=np.int64).tobytes()
        return hashlib.blake2b((parent or self._root) + data, digest_size=16).digest()

    def take(self, key: bytes) -> Block | None:
        """The block with this key, if it is held; its parent is held and in use. In use until `release`."""
        with self.budget.lock:
            block = self._blocks.get(key)
            if block is not None:
                self._use(block)
                self._hits += block.length
            return block

    def holds(self, key: bytes) -> bool:
        """Whether a block is there, for those who plan; it counts as no use."""
        return key in self._blocks

    def acquire(self, tokens: Sequence[int]) -> list[Block]:
        """The longest chain of blocks that the prefix begins with; in use until `release`."""
        self._queried += len(tokens)
        found = []
        for key in self.keys_of(tokens):
            block = self.take(key)
            if block is None:
                break
            found.append(block)
        return found

    def insert(self, block: Block) -> Block | None:
        """Take in a block whose parent is held and in use; it is in use as well.

        Returns: the block that is held now under this key; None where the budget has no room for it.
        """
        with self.budget.lock:
            held = self._blocks.get(block.key)
            if held is None:
                if not self.budget.take(block.size_bytes):
                    self._refused += 1
                    return None
                self._blocks[block.key] = held = block
                self._used_bytes += block.size_bytes
                if block.parent is not None:
                    block.parent.children += 1
            self._use(held)
            return held

    def release(self, chain: Sequence[Block]) -> None:
        """End one use of each block."""
        with self.budget.lock:
            for block in reversed(chain):
                if block.users < 1:
                    raise AssertionError("a block was released more often than it was acquired")
                block.users -= 1
                self._offer(block)

    def stats(self) -> CacheStats:
        """Counters for metrics."""
        return CacheStats(self._queried, self._hits, self._evicted, self._refused, len(self._blocks), self._used_bytes)

    def _use(self, block: Block) -> None:
        block.users += 1
        block.used_at = self.budget.now()

    def _offer(self, block: Block) -> None:
        if block.users == block.children == 0:
            heapq.heappush(self._idle, (block.used_at, next(self._ticket), block))
        if len(self._idle) > 2 * len(self._blocks) + 64:  # entries that no longer hold
            self._idle = [entry for entry in self._idle if self._may_go(entry[0], entry[2])]
            heapq.heapify(self._idle)

    def _may_go(self, used_at: int, block: Block) -> bool:
        """Whether an entry of the heap still holds."""
        is_held = self._blocks.get(block.key) is block
        return is_held and block.users == block.children == 0 and block.used_at == used_at

    def oldest(self) -> int | None:
        """See `Keeper`."""
        while self._idle and not self._may_go(self._idle[0][0], self._idle[0][2]):
            heapq.heappop(self._idle)
        return self._idle[0][0] if self._idle else None

    def release_oldest(self) -> None:
        """See `Keeper`; `oldest` was asked before."""
        block = heapq.heappop(self._idle)[2]
        del self._blocks[block.key]
        self._used_bytes -= block.size_bytes
        self.budget.give_back(block.size_bytes)
        self._evicted += 1
        if block.parent is not None:
            block.parent.children -= 1
            self._offer(block.parent)
