"""Texts under way: from the engine's tokens to pieces of text, for answers in one and in a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from limbeck.engine.jobs import Drawn, Job, Progress
from limbeck.serve.api.shapes import Usage
from limbeck.serve.service import Service
from limbeck.serve.text import Detokenizer, StopStrings

CONTEXT_TOKENS = 6
"""Of the prompt's end, in front of a text that goes on from it."""


@dataclass(slots=True)
class Piece:
    """What a step brought one text."""

    index: int
    text: str
    drawn: Sequence[Drawn]
    """Tokens of the text, those whose text is held back or left out included."""
    prompt: Sequence[Drawn] = ()
    finish: str | None = None


@dataclass(slots=True)
class Tally:
    """Tokens of a request, while it runs."""

    prompt: int
    written: int = 0
    thought: int = 0
    copies: int = 1
    """Texts of each prompt."""
    cached: dict[int, int] = field(default_factory=dict)
    """By prompt: what was in the cache for the first of its texts, since the others find that one's prompt there."""
    drafted: int = 0
    accepted: int = 0

    def note_cached(self, prompt: int, tokens: int) -> None:
        """What a text of a prompt found in the cache."""
        self.cached[prompt] = min(tokens, self.cached.get(prompt, tokens))

    @property
    def usage(self) -> Usage:
        """In the shape of an answer."""
        return Usage(
            prompt_tokens=self.prompt,
            completion_tokens=self.written,
            total_tokens=self.prompt + self.written,
            prompt_tokens_details={"cached_tokens": sum(self.cached.values())},
            completion_tokens_details={
                "reasoning_tokens": self.thought,
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
        )


class _Text:
    """One text: characters from tokens, up to a stop string."""

    def __init__(self, service: Service, job: Job, stops: Sequence[str], goes_on: bool, shown: frozenset[int]) -> None:
        self._hidden = hidden_in(service, job) - shown
        before = [token for token in job.prompt[-CONTEXT_TOKENS:] if token not in self._hidden] if goes_on else ()
        self._characters = Detokenizer(service.vocabulary.decode, before)
        self._stops = StopStrings(stops)

    def take(self, index: int, progress: Progress) -> Piece:
        """What a step's tokens add."""
        text, drawn = "", []
        for token in progress.tokens:
            drawn.append(token)
            if token.token not in self._hidden:
                text += self._stops.add(self._characters.add(token.token))
            if self._stops.found is not None:
                return Piece(index, text, drawn, progress.prompt, "stop")
        if progress.finish is not None:
            text += self._stops.add(self._characters.finish())
            text += self._stops.finish()
        finish = "stop" if self._stops.found is not None else progress.finish
        return Piece(index, text, drawn, progress.prompt, finish)


def hidden_in(service: Service, job: Job) -> frozenset[int]:
    """Tokens that a text does not show."""
    return service.vocabulary.hidden | job.end_tokens


async def write(
    service: Service,
    jobs: Sequence[Job],
    stops: Sequence[str],
    until: float,
    tally: Tally,
    goes_on: bool,
    shown: frozenset[int] = frozenset(),
) -> AsyncIterator[Piece]:
    """Pieces of all texts as they come; the last one of each has its `finish`.

    Args:
      until: when the request's time is over.
      goes_on: whether a text continues the words of its prompt.
      tally: counts along.
      shown: special tokens that are shown, since the text is read by them.
    Raises: Refusal.
    """
    texts = [_Text(service, job, stops, goes_on, shown) for job in jobs]
    last: dict[int, float] = {}
    async with service.dispatcher.hand_in(jobs, until) as ticket:
        service.metrics.prompt_tokens.inc(tally.prompt)
        async for part, progress, _ in ticket.outcomes():
            assert isinstance(progress, Progress)
            piece = texts[part].take(part, progress)
            _observe(service, last, part, ticket.arrived, len(piece.drawn))
            tally.written += len(piece.drawn)
            tally.note_cached(part // tally.copies, progress.cached_tokens)
            tally.drafted += progress.drafted_tokens
            tally.accepted += progress.accepted_tokens
            if piece.finish is not None:
                ticket.drop(part)
                service.metrics.succeeded(piece.finish)
            yield piece


def _observe(service: Service, last: dict[int, float], part: int, arrived: float, tokens: int) -> None:
    if not tokens:
        return
    now = time.monotonic()
    if part not in last:
        service.metrics.first_token.observe(now - arrived)
    else:
        service.metrics.between_tokens.observe((now - last[part]) / tokens)
    last[part] = now
    service.metrics.generation_tokens.inc(tokens)
