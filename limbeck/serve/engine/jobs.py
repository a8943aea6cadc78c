"""What is asked of the engine's generation and what comes out of it, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

FinishReason = Literal["stop", "length"]
"""stop: an end token, or a constraint that is complete; length: the limit of tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is drawn from the logits."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens that have this share of the most likely one's probability."""
    seed: int | None = None
    """Same seed and prompt, same text, whatever else is in the batch; null: another one each time."""


class Constraint(Protocol):
    """What may come next; one object a job, which keeps its state."""

    def allowed(self) -> Tensor | None:
        """bool [V], or None where everything is allowed."""

    def accept(self, token: int) -> None:
        """Go on by a token."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""


class ThoughtBudget(NamedTuple):
    """A limit on the thought: once it is used up, the closing marker is written in the model's place."""

    tokens: int
    """Most tokens between the markers."""
    open_ids: Sequence[int]
    """Empty where the prompt has opened the thought already."""
    close_ids: Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One text to generate."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_tokens: int
    """0 only scores the prompt."""
    min_tokens: int = 0
    """Tokens before an end token may be drawn."""
    sampling: Sampling = Sampling()
    end_tokens: frozenset[int] = frozenset()
    """Tokens that end the text; empty goes on to `max_tokens`."""
    top_log_probs: int | None = None
    """How many alternatives to report for each token; None reports no log-probs at all."""
    prompt_log_probs: int | None = None
    """The same for the tokens of the prompt."""
    constraint: Constraint | None = None
    """Starts behind the thought where there is a `thought`."""
    thought: ThoughtBudget | None = None


class Drawn(NamedTuple):
    """A token of the prompt or of the text."""

    token: int
    log_prob: float | None
    """Natural log, at temperature 1 and before any filter; None where it was not asked for, and for the first token of
    a prompt."""
    top: Sequence[tuple[int, float]]
    """Most likely tokens and their log-probs, best first."""


class Progress(NamedTuple):
    """What a step brought a job."""

    job: int
    """The number `add` gave."""
    tokens: Sequence[Drawn]
    """Of the text, in order; several where a draft was accepted."""
    prompt: Sequence[Drawn]
    """Of the prompt, once, where asked for."""
    finish: FinishReason | None
    cached_tokens: int
    """Of the prompt, taken from the cache."""
