"""What is larger than a round, worked off a piece at a time, so that texts under way go on.

A scoring request's prefix is read block by block into the cache and stays pinned; its items go in groups. Scores do not
depend on the company that items have, so that those of all pieces are those of one call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from limbeck.engine.backend import Backend
from limbeck.engine.embedding import Embedding
from limbeck.engine.requests import Request, Scores
from limbeck.engine.scoring import Pin, Scorer
from limbeck.errors import ConfigError
from limbeck.serve.line import Part
from limbeck.serve.ticket import Embed, prefix_of

ITEM_TOKENS = 16
"""An item costs as much as so many tokens at least."""


def size_of(request: Request) -> int:
    """Tokens that a request is counted as."""
    return len(request.prefix) + sum(max(ITEM_TOKENS, len(item)) for item in request.items)


class LongRequest:
    """One under way; `step` goes on, `release` lets go."""

    def __init__(self, part: Part, scorer: Scorer, tokens: int) -> None:
        """`part`: of a request, or of a prefix to compute; `tokens`: of a piece."""
        work = part.work
        self.part = part
        self._scorer = scorer
        self._request = work if isinstance(work, Request) else Request(prefix_of(work), [], [0])
        self._tokens = max(scorer.config.block_tokens, tokens)
        self._read, self._scored = 0, 0
        self._pin: Pin | None = None
        self._found: list[Scores] = []

    def step(self) -> Scores | None:
        """One more piece; the scores once all are there."""
        if len(self._request.prefix) - self._read > self._tokens:
            self._read_on(self._request.prefix)
            return None
        items = self._next_items()
        if items and len(items[0]) > self._tokens:
            # As a prefix, which can be read in pieces; an item cannot.
            whole = [*self._request.prefix, *items[0]]
            if len(whole) - self._read > self._tokens:
                self._read_on(whole)
                return None
            self._take(self._request._replace(prefix=whole, items=[()]), 1)
            self._read = min(self._read, len(self._request.prefix))
        else:
            self._take(self._request._replace(items=items), len(items))
        return _joined(self._found) if self._scored == len(self._request.items) else None

    def release(self) -> None:
        """Let the cache have its blocks back."""
        if self._pin is not None:
            self._pin.release()
            self._pin = None

    def _read_on(self, tokens: Sequence[int]) -> None:
        block = self._scorer.config.block_tokens
        self._read += self._tokens // block * block
        try:
            pin = self._scorer.prefill(tokens[: self._read])
        except ConfigError:  # no room: what the cache cannot hold is computed in one piece
            self._read = len(tokens)
            return
        self.release()
        self._pin = pin

    def _next_items(self) -> list[Sequence[int]]:
        items: list[Sequence[int]] = []
        left = self._tokens
        for item in self._request.items[self._scored :]:
            left -= max(ITEM_TOKENS, len(item))
            if items and left < 0:
                break
            items.append(item)
        return items

    def _take(self, request: Request, count: int) -> None:
        self._found += self._scorer.score([request])
        self._scored += count


class LongEmbedding(Embedding):
    """Texts whose vectors are under way."""

    def __init__(self, part: Part, work: Embed, decoder: Backend, tokens: int) -> None:
        super().__init__(decoder, work.texts, work.pooling, tokens)
        self.part = part

    def release(self) -> None:
        """Nothing is held but its own states."""


def _joined(found: Sequence[Scores]) -> Scores:
    logits = torch.cat([scores.logits for scores in found])
    sums = [scores.log_normalizers for scores in found if scores.log_normalizers is not None]
    return Scores(logits, torch.cat(sums) if sums else None)
