"""A text in a decoder: its prompt, which others may share, the tokens behind it, and its place in the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from limbeck.engine.backend import Backend
from limbeck.engine.prefix_cache import Block, PrefixCache
from limbeck.engine.states import Segment

Span = tuple[int, int]
"""First token and the one behind the last, counted from the start of the prompt."""
Behind = Callable[[Any, int], Any]
"""From a prompt's states and a number of tokens to a place for those behind it."""


class Prompt:
    """Tokens that are read block by block; what the cache holds of them is taken from there."""

    def __init__(self, tokens: Sequence[int], decoder: Backend, cache: PrefixCache, is_cached: bool = True) -> None:
        """`is_cached`: whether the cache is looked up; it is filled in any case."""
        self.tokens = tokens
        self.users = 0
        self.cached_tokens = 0
        self.computed = 0
        self.state: Tensor | None = None
        """[D] at the last token that is computed."""
        self.states = decoder.states(len(tokens))
        self._cache, self._is_cached = cache, is_cached
        self._spans, self._keys = cache.spans(len(tokens)), cache.keys_of(tokens)
        self.chain = cache.acquire(tokens) if is_cached else []
        """Blocks that are held by the cache and in use here."""
        for block in self.chain:
            self._load(block)

    @property
    def is_reading(self) -> bool:
        """Whether some of it is still to be computed."""
        return self.computed < len(self.tokens)

    def take_cached(self) -> None:
        """Blocks that others have put into the cache since."""
        while self._is_cached and self.is_reading and len(self.chain) == self._next_block:
            block = self._cache.take(self._keys[len(self.chain)])
            if block is None:
                return
            self.chain.append(block)
            self._load(block)

    def release(self) -> None:
        """Let the cache have its blocks back."""
        self._cache.release(self.chain)
        self.chain = []

    def missing_blocks(self) -> Iterator[tuple[bytes, int]]:
        """Key and length of each block that is not computed."""
        first = self._next_block
        for key, (start, stop) in zip(self._keys[first:], self._spans[first:], strict=True):
            yield key, stop - start

    def next_spans(self, blocks: int) -> Sequence[Span]:
        """The next blocks to compute."""
        return self._spans[self._next_block : self._next_block + blocks]

    @property
    def full_blocks(self) -> list[Block]:
        """Those of the chain, which text may be put behind."""
        return [block for block in self.chain if block.length == self._cache.block_tokens]

    def segment(self, span: Span) -> Segment:
        """Tokens of a span, for a pass."""
        return Segment(self.tokens[slice(*span)], self.states, span[0], grows=True)

    def advance(self, span: Span, state: Tensor) -> None:
        """A block is computed; `state` [D] is that at its last token."""
        self.computed, self.state = span[1], state
        if span[1] - span[0] == self._cache.block_tokens:
            keep(self._cache, self.chain, self.tokens[slice(*span)], span, self.states, state)

    @property
    def _next_block(self) -> int:
        return self.computed // self._cache.block_tokens

    def _load(self, block: Block) -> None:
        self.states.put(self.computed, block.keys, block.values)
        self.computed, self.state = self.computed + block.length, block.last_hidden
        self.cached_tokens += block.length


class Prompts:
    """Those in use over one decoder; texts with the same prompt have it together, so that it is read once."""

    def __init__(self, decoder: Backend, cache: PrefixCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._shared: dict[tuple[int, ...], Prompt] = {}

    def take(self, tokens: Sequence[int], is_cached: bool = True) -> Prompt:
        """A prompt for a text, until `release`; one that is not looked up in the cache is not shared either."""
        prompt = self._shared.get(tuple(tokens)) if is_cached else None
        if prompt is None:
            prompt = Prompt(tokens, self._decoder, self._cache, is_cached)
            if is_cached:
                self._shared[tuple(tokens)] = prompt
        prompt.users += 1
        return prompt

    def release(self, prompt: Prompt) -> None:
        """One text less has it."""
        prompt.users -= 1
        if not prompt.users:
            prompt.release()
            if self._shared.get(tuple(prompt.tokens)) is prompt:
                del self._shared[tuple(prompt.tokens)]


class Context:
    """A prompt and what follows it, token by token.

    Tokens at the end may be taken back: their keys stay where they are, seen by nobody, until others are written there.
    """

    def __init__(self, prompt: Prompt, room: int, behind: Behind, cache: PrefixCache, keeps_text: bool = False) -> None:
        """Set up.

        Args:
          room: tokens that may follow the prompt.
          behind: makes the place for them.
          keeps_text: whether full blocks of what follows go to the cache.
        """
        self.prompt = prompt
        self.tokens = list(prompt.tokens)
        """Of the prompt and the text."""
        self._room, self._behind, self._cache, self._keeps_text = room, behind, cache, keeps_text
        self._states: Any = None
        self._computed = len(prompt.tokens)
        self._state: Tensor | None = None
        self._chain: list[Block] | None = None
        """Full blocks of the prompt, and those that the text has put behind them."""

    @property
    def state(self) -> Tensor:
        """[D] at the last token that is computed."""
        state = self.prompt.state if self._state is None else self._state
        assert state is not None
        return state

    def next_spans(self) -> Sequence[Span]:
        """Each token behind the prompt that is not computed."""
        return [(token, token + 1) for token in range(self._computed, len(self.tokens))]

    def segment(self, span: Span) -> Segment:
        """A token, for a pass."""
        if self._states is None:
            self._states = self._behind(self.prompt.states, self._room)
        return Segment((self.tokens[span[0]],), self._states, span[0], True)

    def advance(self, span: Span, state: Tensor) -> None:
        """A token is computed; `state` [D] is that at it."""
        self._computed, self._state = span[1], state
        size = self._cache.block_tokens
        if self._keeps_text and span[1] % size == 0:
            if self._chain is None:
                self._chain = self.prompt.full_blocks
            block = (span[1] - size, span[1])
            keep(self._cache, self._chain, self.tokens[slice(*block)], block, self._states, state)

    def take_back(self, length: int) -> None:
        """Forget the tokens behind the first `length`, computed or not."""
        del self.tokens[length:]
        self._computed = min(self._computed, length)

    def release(self) -> None:
        """Let the cache have the text's blocks back."""
        if self._chain is not None:
            self._cache.release(self._chain[len(self.prompt.full_blocks) :])
        self._chain = None


def keep(cache: PrefixCache, chain: list[Block], tokens: Sequence[int], span: Span, states: Any, state: Tensor) -> bool:
    """Put a block behind a chain of full ones into the cache, unless one before it found no room there."""
    if len(chain) != span[0] // cache.block_tokens or not cache.budget.total_bytes:
        return False
    parent = chain[-1] if chain else None
    keys, values = states.cut(*span)
    key = cache.key_after(None if parent is None else parent.key, tokens)
    block = cache.insert(Block(key=key, parent=parent, keys=keys, values=values, last_hidden=state.clone()))
    if block is not None:
        chain.append(block)
    return block is not None


def plan_reading(prompts: Iterable[Prompt], most_tokens: int, cache: PrefixCache) -> list[tuple[Prompt, Span]]:
    """Which blocks of prompts are read in a pass, first come, first served; one at least.

    A prompt waits where another one reads the block that it needs next, and finds it in the cache afterwards.
    """
    left = most_tokens
    found: list[tuple[Prompt, Span]] = []
    under_way: set[bytes] = set()
    for prompt in prompts:
        prompt.take_cached()
        count = 0
        for key, length in prompt.missing_blocks():
            if (length > left and (found or count)) or (key in under_way and cache.budget.total_bytes):
                break
            under_way.add(key)
            left, count = left - length, count + 1
        found += [(prompt, span) for span in prompt.next_spans(count)]
    return found
