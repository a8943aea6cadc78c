"""Scores by prefill alone: how likely each label token is behind a prefix and each of many items.

    score(prefix, item) = log softmax over labels of the logits behind prefix + item

Nothing is sampled, and only the head's rows of the labels are multiplied. The passes come from `plan`; whatever way is
taken, an item sees its prefix and itself, at the positions it would have alone.

Equality: every way gives the same number to float32's rounding. With int8 layers it gives the same bits, for one item
or many, in any slot, with any state of the cache; what the bits do depend on is where the prefix ends, since attention
over prefix and item is merged from both parts, and the length of a block. The normaliser over the whole vocabulary is
one BLAS product and equal to rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.config import checked
from limbeck.engine.backend import Backend
from limbeck.engine.budget import Budget
from limbeck.engine.plan import Costs, Piece, Plan, PrefixAndItems, make_plan, measure_costs
from limbeck.engine.prefix_cache import Block, CacheStats, PrefixCache
from limbeck.engine.requests import Request, Scores
from limbeck.engine.states import Segment, check_ids
from limbeck.errors import ConfigError, ModelError

CACHE_BYTES = 1 << 30


@checked
class ScoringConfig:
    """How prefixes are kept and passes are made."""

    block_tokens: int = 64
    """Tokens of a block, the unit in which prefixes are shared."""
    path: str = "auto"
    """single, cached, shared, packed, or auto: the cheapest of the last three by the cost model."""
    pass_tokens: int | None = None
    """Most tokens of a pass; null: the best of the measured sizes."""

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or (self.pass_tokens or 1) < 1:
            raise ConfigError("scoring: block_tokens and pass_tokens must be 1 or more.")


class Usage(NamedTuple):
    """What a call of `score` went through."""

    path: str
    passes: int
    computed_tokens: int
    cached_tokens: int


class Pin:
    """A prefix that stays in the cache until `release`; a context manager."""

    def __init__(self, cache: PrefixCache, chain: list[Block]) -> None:
        self._cache, self._chain = cache, chain

    @property
    def tokens(self) -> int:
        return sum(block.length for block in self._chain)

    def release(self) -> None:
        """Let it go; more than once does no harm."""
        chain, self._chain = self._chain, []
        self._cache.release(chain)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _Prefix:
    """A prefix under way: its blocks, and its keys and values in one piece."""

    def __init__(self, cache: PrefixCache, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens
        self.items: list[tuple[int, ...]] = []
        self.keys = cache.keys_of(tokens)
        self.spans = cache.spans(len(tokens))
        self.chain = cache.acquire(tokens)
        """Blocks that are held by the cache and in use here."""
        self.states: Any = None
        self.last_hidden: Tensor | None = self.chain[-1].last_hidden if len(self.chain) == len(self.spans) > 0 else None

        self.hidden: dict[int, Tensor] = {}
        """State [D] at the last token of each item that has tokens."""

    def state(self, item: int) -> Tensor:
        """State [D] that an item is scored by."""
        found = self.hidden[item] if self.items[item] else self.last_hidden
        assert found is not None, "the plan left an item out"
        return found

    def work(self) -> PrefixAndItems:
        return PrefixAndItems(self.spans, len(self.chain), [len(item) for item in self.items])

    def take(self, piece: Piece, state: Tensor) -> None:
        """Keep a state that is read later: behind an item, or behind the whole prefix."""
        if piece.item is not None:
            self.hidden[piece.item] = state
        elif piece.span == self.spans[-1]:
            self.last_hidden = state

    def load(self, decoder: Backend) -> None:
        """Room for the whole prefix, filled with the blocks that are there."""
        self.states = decoder.states(len(self.tokens))
        for block, (start, _) in zip(self.chain, self.spans, strict=False):
            self.states.put(start, block.keys, block.values)


class Scorer:
    """A decoder with a prefix cache. One thread at a time."""

    def __init__(
        self,
        decoder: Backend,
        config: ScoringConfig | None = None,
        model_key: str = "",
        costs: Costs | None = None,
        budget: Budget | int = CACHE_BYTES,
    ) -> None:
        """Set up.

        Args:
          decoder: the model.
          config: see there.
          model_key: what tells the model from others, should caches ever be shared (`models.load.model_hash`).
          costs: of passes; measured now when None.
          budget: bytes of keys and values that are kept between calls, or what they are shared with; 0 keeps nothing.
        """
        self.decoder, self.config = decoder, config or ScoringConfig()
        kept = (budget, self.config.block_tokens) if decoder.has_blocks else (0, decoder.max_tokens)
        self.cache = PrefixCache(*kept, model_key)
        self.costs = costs or measure_costs(decoder)
        self.usage: Usage | None = None
        """Of the last call of `score`."""

    def score(self, requests: Sequence[Request]) -> list[Scores]:
        """Scores of all items of all requests, in their order.

        Equal prefixes are computed once; keys and values of all prefixes of a call are in memory at the same time,
        `decoder.bytes_per_token` each token.

        Raises: ModelError for ids or lengths that the model does not have, and for an empty item without a prefix.
        """
        for request in requests:
            self._check(request)
        prefixes: dict[tuple[int, ...], _Prefix] = {}
        places = []
        try:
            for request in requests:
                tokens = tuple(request.prefix)
                if tokens not in prefixes:
                    prefixes[tokens] = _Prefix(self.cache, tokens)
                prefix = prefixes[tokens]
                places.append((prefix, len(prefix.items)))
                prefix.items.extend(tuple(item) for item in request.items)
            self._compute(list(prefixes.values()), self.config.path)
            return [self._scores(request, *place) for request, place in zip(requests, places, strict=True)]
        finally:
            for prefix in prefixes.values():
                self.cache.release(prefix.chain)

    def prefill(self, tokens: Sequence[int]) -> Pin:
        """Compute a prefix before its items are known and keep it until the pin is released.

        Raises: ConfigError when it finds no room in the cache beside what is in use.
        """
        self._check(Request(tokens, [()], [0]))
        if not self.decoder.has_blocks:
            raise ConfigError("prefill: nothing can be kept of this model, which reads each text from its start.")
        prefix = _Prefix(self.cache, tuple(tokens))
        try:
            self._compute([prefix], "shared")
            if len(prefix.chain) < len(prefix.spans):
                needed, budget = len(tokens) * self.decoder.bytes_per_token, self.cache.budget
                raise ConfigError(
                    f"prefill: {len(tokens)} tokens take {needed} bytes; of {budget.total_bytes}, "
                    f"{budget.used_bytes} are taken. Release pins or raise the budget."
                )
        except BaseException:
            self.cache.release(prefix.chain)
            raise
        return Pin(self.cache, prefix.chain)

    def cache_stats(self) -> CacheStats:
        """The cache's counters."""
        return self.cache.stats()

    def _check(self, request: Request) -> None:
        vocabulary = self.decoder.vocab_size
        if not request.labels or any(not 0 <= label < vocabulary for label in request.labels):
            raise ModelError(f"labels {list(request.labels)}: give one token id or more, each in 0..{vocabulary - 1}.")
        if not request.prefix and not all(request.items):
            raise ModelError("an empty item behind an empty prefix; there is nothing to score.")
        longest = len(request.prefix) + max(map(len, request.items), default=0)
        if longest > self.decoder.max_tokens:
            raise ModelError(f"a prompt of {longest} tokens; the limit is {self.decoder.max_tokens}.")
        for tokens in filter(len, (request.prefix, *request.items)):
            check_ids(tokens, self.decoder.embeddings)

    def _compute(self, prefixes: Sequence[_Prefix], path: str) -> None:
        """The states of all items, and what the cache has room for of the prefixes' blocks."""
        works = [prefix.work() for prefix in prefixes]
        plan = make_plan(works, self.costs, path, self.config.pass_tokens)
        self.usage = _usage(plan, works)
        for prefix in prefixes if plan.path != "single" else ():
            prefix.load(self.decoder)
        for pieces in plan.passes:
            if plan.path == "single":
                prefixes[pieces[0].work].load(self.decoder)
            states = self.decoder.run([_segment(prefixes[piece.work], piece) for piece in pieces])
            for piece, state in zip(pieces, states, strict=True):
                prefixes[piece.work].take(piece, state)
                if piece.item is None and plan.path != "single":
                    self._keep(prefixes[piece.work], piece.span, state)
        for prefix in prefixes:
            prefix.states = None

    def _keep(self, prefix: _Prefix, span: tuple[int, int], state: Tensor) -> None:
        """Put a block into the cache, unless one before it found no room."""
        number = span[0] // self.cache.block_tokens
        if len(prefix.chain) != number or not self.cache.budget.total_bytes:
            return
        keys, values = prefix.states.cut(*span)
        block = self.cache.insert(
            Block(
                key=prefix.keys[number],
                parent=prefix.chain[-1] if prefix.chain else None,
                keys=keys,
                values=values,
                last_hidden=state.clone(),
            )
        )
        if block is not None:
            prefix.chain.append(block)

    @torch.inference_mode()
    def _scores(self, request: Request, prefix: _Prefix, first: int) -> Scores:
        if not request.items:
            empty = torch.empty(0, len(request.labels))
            return Scores(empty, empty.new_empty(0) if request.full else None)
        rows = torch.stack([prefix.state(first + number) for number in range(len(request.items))])
        logits = self.decoder.label_logits(rows, torch.tensor(request.labels, device=rows.device))
        return Scores(logits, self.decoder.log_normalizers(rows) if request.full else None)


def _segment(prefix: _Prefix, piece: Piece) -> Segment:
    start, stop = piece.span
    if piece.item is None:
        return Segment(prefix.tokens[start:stop], prefix.states, start, grows=True)
    return Segment(prefix.items[piece.item], prefix.states, start)


def _usage(plan: Plan, works: Sequence[PrefixAndItems]) -> Usage:
    computed = sum(piece.span[1] - piece.span[0] for pieces in plan.passes for piece in pieces)
    cached = 0 if plan.path == "single" else sum(w.spans[w.cached - 1][1] for w in works if w.cached)
    return Usage(plan.path, len(plan.passes), computed, cached)
