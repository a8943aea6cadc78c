"""What is asked of the engine's generation and what comes out of it, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from limbeck.engine.sampling import Sampling
from limbeck.engine.states import check_ids
from limbeck.errors import ConfigError, ModelError

DEFAULT_SAMPLING = Sampling()
FinishReason = Literal["stop", "length"]
"""stop: an end token, or a constraint that is complete; length: the limit of tokens."""


class Constraint(Protocol):
    """What may come next; one object a job, which keeps its state."""

    def allowed(self) -> Tensor | None:
        """bool [V], or None where everything is allowed."""

    def accept(self, token: int) -> None:
        """Go on by a token."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""

    @property
    def size_bytes(self) -> int:
        """Of memory that it takes while the text is under way."""


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
    sampling: Sampling = DEFAULT_SAMPLING
    end_tokens: frozenset[int] = frozenset()
    """Tokens that end the text; empty goes on to `max_tokens`."""
    top_log_probs: int | None = None
    """How many alternatives to report for each token; None reports no log-probs at all."""
    prompt_log_probs: int | None = None
    """The same for the tokens of the prompt."""
    log_prob_temperature: float = 1.0
    """Divides the logits of all log-probs."""
    constraint: Constraint | None = None
    """Starts behind the thought where there is a `thought`."""
    thought: ThoughtBudget | None = None

    @property
    def is_echoed(self) -> bool:
        """Whether the prompt is read anew: its log-probs need every state of it, the cache has a block's last one."""
        return self.prompt_log_probs is not None


def check_job(job: Job, longest: int, embeddings: int, vocabulary: int) -> None:
    """Refuse a job that a model cannot do.

    Args:
      longest: tokens of prompt and text that it takes.
      embeddings: ids that may stand in a prompt; vocabulary: ids that it writes.
    Raises: ModelError for ids or lengths that the model does not have; ConfigError for limits that contradict each
    other.
    """
    length, whole = len(job.prompt), len(job.prompt) + job.max_tokens
    if not job.prompt:
        raise ModelError("a job with an empty prompt; give one token or more, say the beginning-of-text token.")
    if whole > longest:
        raise ModelError(f"a prompt of {length} and {job.max_tokens} more tokens; the limit is {longest}.")
    check_ids(job.prompt, embeddings)
    markers = [] if job.thought is None else [*job.thought.open_ids, *job.thought.close_ids]
    wrong = [token for token in (*markers, *job.end_tokens) if not 0 <= token < vocabulary]
    if wrong:
        raise ModelError(f"end tokens or markers {wrong}; the model has 0 to {vocabulary - 1}.")
    _check_limits(job)


def _check_limits(job: Job) -> None:
    """What holds whatever the model is."""
    if not 0 <= job.min_tokens <= job.max_tokens:
        raise ConfigError(f"min_tokens {job.min_tokens}, max_tokens {job.max_tokens}; 0 <= min <= max is needed.")
    if job.thought is not None and (job.thought.tokens < 0 or not job.thought.close_ids):
        raise ConfigError("a thought's budget must be 0 tokens or more, with a closing marker.")
    if min(job.top_log_probs or 0, job.prompt_log_probs or 0) < 0:
        raise ConfigError("top_log_probs and prompt_log_probs must be 0 or more.")
    if not 0.0 < job.log_prob_temperature < float("inf"):
        raise ConfigError(f"log_prob_temperature must be finite and above 0; found {job.log_prob_temperature}.")
    job.sampling.check()


class Drawn(NamedTuple):
    """A token of the prompt or of the text."""

    token: int
    log_prob: float | None
    """Natural log, at the job's `log_prob_temperature` and before any filter; None where it was not asked for, and for
    the first token of a prompt."""
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
    drafted_tokens: int = 0
    """Proposed by a draft in this step."""
    accepted_tokens: int = 0
    """How many of those the text has taken."""
