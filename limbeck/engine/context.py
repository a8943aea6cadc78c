"""A text in a decoder: its tokens, what of them is computed, and its place in the prefix cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from limbeck.engine.decoder import Decoder, KeyValues, Segment
from limbeck.engine.prefix_cache import Block, PrefixCache

Span = tuple[int, int]
"""First token and the one behind the last, counted from the start of the prompt."""


class Context:
    """The prompt is read block by block, what follows token by token.

    Tokens at the end may be taken back: their keys stay where they are, seen by nobody, until others are written there.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        room: int,
        decoder: Decoder,
        cache: PrefixCache,
        keeps_text: bool = False,
        is_cached: bool = True,
    ) -> None:
        """Set up, with what the cache holds of the prompt.

        Args:
          room: tokens that may follow the prompt.
          keeps_text: whether full blocks of what follows go to the cache.
          is_cached: whether the cache is looked up; it is filled in any case.
        """
        self.tokens = list(prompt)
        """Of the prompt and the text."""
        self.cached_tokens = 0
        self._cache, self._keeps_text, self._is_cached = cache, keeps_text, is_cached
        self._prompt_tokens = len(prompt)
        self._spans, self._keys = cache.spans(len(prompt)), cache.keys_of(prompt)
        self._states = KeyValues(decoder, len(prompt) + room)
        self._computed = 0
        self._state: Tensor | None = None
        self._chain = cache.acquire(prompt) if is_cached else []
        for block in self._chain:
            self._load(block)

    @property
    def is_reading(self) -> bool:
        """Whether some of the prompt is still to be computed."""
        return self._computed < self._prompt_tokens

    @property
    def state(self) -> Tensor:
        """[D] at the last token that is computed."""
        assert self._state is not None
        return self._state

    def take_cached(self) -> None:
        """Blocks that others have put into the cache since."""
        while self._is_cached and self.is_reading and len(self._chain) == self._block_at(self._computed):
            block = self._cache.take(self._keys[len(self._chain)])
            if block is None:
                return
            self._chain.append(block)
            self._load(block)

    def missing_blocks(self) -> Iterator[tuple[bytes, int]]:
        """Key and length of each block of the prompt that is not computed."""
        first = self._block_at(self._computed)
        for key, (start, stop) in zip(self._keys[first:], self._spans[first:], strict=True):
            yield key, stop - start

    def next_spans(self, blocks: int) -> Sequence[Span]:
        """What is computed next: so many blocks of the prompt, or each token behind it that is not computed."""
        if self.is_reading:
            first = self._block_at(self._computed)
            return self._spans[first : first + blocks]
        return [(token, token + 1) for token in range(self._computed, len(self.tokens))]

    def segment(self, span: Span) -> Segment:
        """Tokens of a span, for a pass."""
        return Segment(self.tokens[slice(*span)], self._states, span[0], grows=True)

    def advance(self, span: Span, state: Tensor) -> None:
        """A span is computed; `state` [D] is that at its last token."""
        self._computed, self._state = span[1], state
        last = self._block_at(span[1] - 1)
        if span[1] % self._cache.block_tokens == 0 and (self._keeps_text or span[1] <= self._prompt_tokens):
            self._keep(last, (last * self._cache.block_tokens, span[1]), state)

    def take_back(self, length: int) -> None:
        """Forget the tokens behind the first `length`, computed or not."""
        del self.tokens[length:]
        self._computed = min(self._computed, length)

    def release(self) -> None:
        """Let the cache have its blocks back."""
        self._cache.release(self._chain)
        self._chain = []

    def _block_at(self, token: int) -> int:
        return token // self._cache.block_tokens

    def _load(self, block: Block) -> None:
        start, stop = self._computed, self._computed + block.length
        self._states.keys[:, :, start:stop] = block.keys
        self._states.values[:, :, start:stop] = block.values
        self._computed, self._state = stop, block.last_hidden
        self.cached_tokens += block.length

    def _keep(self, number: int, span: Span, state: Tensor) -> None:
        """Put a block into the cache, unless one before it found no room."""
        parents = [block for block in self._chain if block.length == self._cache.block_tokens]
        if len(parents) != number or self._cache.budget_bytes == 0:
            return
        parent = parents[-1] if parents else None
        block = self._cache.insert(
            Block(
                key=self._cache.key_after(None if parent is None else parent.key, self.tokens[slice(*span)]),
                parent=parent,
                keys=self._states.keys[:, :, slice(*span)].clone(),
                values=self._states.values[:, :, slice(*span)].clone(),
                last_hidden=state.clone(),
            )
        )
        if block is not None:
            self._chain.append(block)


def plan_reading(contexts: Mapping[int, Context], most_tokens: int, cache: PrefixCache) -> dict[int, int]:
    """How many blocks of their prompts the contexts read in a pass, first come, first served; one at least.

    A context waits where another one reads the block that it needs next, and finds it in the cache afterwards.
    """
    left = most_tokens
    blocks: dict[int, int] = {}
    under_way: set[bytes] = set()
    for number, context in contexts.items():
        if not context.is_reading:
            continue
        context.take_cached()
        count = 0
        for key, length in context.missing_blocks():
            is_first = not blocks and count == 0
            if (length > left and not is_first) or (key in under_way and cache.budget_bytes):
                break
            under_way.add(key)
            left, count = left - length, count + 1
        if count:
            blocks[number] = count
    return blocks
