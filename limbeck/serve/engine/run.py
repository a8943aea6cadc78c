"""A job under way: what of it is computed, what it has written, and its place in the prefix cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from limbeck.serve.engine.decoder import Decoder, KeyValues, Segment
from limbeck.serve.engine.jobs import Drawn, FinishReason, Job
from limbeck.serve.engine.prefix_cache import Block, PrefixCache
from limbeck.serve.engine.rules import Rules

Span = tuple[int, int]
"""First token and the one behind the last, counted from the start of the prompt."""


class Run:
    """One job. It reads its prompt block by block, then writes."""

    def __init__(self, job: Job, decoder: Decoder, cache: PrefixCache, keeps_text: bool) -> None:
        self.job, self.rules = job, Rules(job)
        self.cached_tokens = 0
        self.is_echoed = job.prompt_log_probs is not None
        self._cache, self._keeps_text = cache, keeps_text
        self._random = np.random.Generator(np.random.PCG64(job.sampling.seed))
        self._tokens = list(job.prompt)
        """Of the prompt and the text."""
        self._spans, self._keys = cache.spans(len(job.prompt)), cache.keys_of(job.prompt)
        self._states = KeyValues(decoder, len(job.prompt) + job.max_tokens)
        self.kv_bytes = (len(job.prompt) + job.max_tokens) * decoder.bytes_per_token
        self._computed = 0
        self._state: Tensor | None = None
        self._echo: list[Drawn] = [Drawn(job.prompt[0], None, ())] if self.is_echoed else []
        # Log-probs of a prompt need every state of it, and the cache has a block's last one only.
        self._chain = [] if self.is_echoed else cache.acquire(job.prompt)
        for block in self._chain:
            self._load(block)

    @property
    def is_reading(self) -> bool:
        """Whether some of the prompt is still to be computed."""
        return self._computed < len(self.job.prompt)

    @property
    def state(self) -> Tensor:
        """[D] at the last token that is computed."""
        assert self._state is not None
        return self._state

    def take_cached(self) -> None:
        """Blocks that others have put into the cache since."""
        while not self.is_echoed and self.is_reading and len(self._chain) == self._block_at(self._computed):
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
        """What is computed next: so many blocks of the prompt, or the last token of the text."""
        if self.is_reading:
            first = self._block_at(self._computed)
            return self._spans[first : first + blocks]
        return [] if self._computed == len(self._tokens) else [(self._computed, len(self._tokens))]

    def segment(self, span: Span) -> Segment:
        """Tokens of a span, for a pass."""
        return Segment(self._tokens[slice(*span)], self._states, span[0], grows=True)

    def advance(self, span: Span, state: Tensor) -> None:
        """A span is computed; `state` [D] is that at its last token."""
        self._computed, self._state = span[1], state
        last = self._block_at(span[1] - 1)
        if span[1] % self._cache.block_tokens == 0 and (self._keeps_text or span[1] <= len(self.job.prompt)):
            self._keep(last, (last * self._cache.block_tokens, span[1]), state)

    def uniform(self) -> float:
        """The next random number in [0, 1); one a token, so that it depends on seed and place alone."""
        return float(self._random.random())

    def accept(self, token: int) -> FinishReason | None:
        """Write a token. Returns: why the text ends with it, if it does."""
        self._tokens.append(token)
        if self.rules.accept(token):
            return "stop"
        return "length" if len(self._tokens) == len(self.job.prompt) + self.job.max_tokens else None

    def echo(self, drawn: Sequence[Drawn]) -> None:
        """Log-probs of further tokens of the prompt."""
        self._echo += drawn

    def take_echo(self) -> Sequence[Drawn]:
        """Log-probs of the prompt, the first time only."""
        echo, self._echo = self._echo, []
        return echo

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
                key=self._cache.key_after(None if parent is None else parent.key, self._tokens[slice(*span)]),
                parent=parent,
                keys=self._states.keys[:, :, slice(*span)].clone(),
                values=self._states.values[:, :, slice(*span)].clone(),
                last_hidden=state.clone(),
            )
        )
        if block is not None:
            self._chain.append(block)
