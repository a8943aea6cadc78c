"""Speculative decoding: a small model proposes tokens, one pass of the served one takes those that it would have drawn.

A text's step is then

    draft      k tokens x_i ~ q_i, one pass of the draft each
    verify     one pass of the target over all k + 1 places, each a row that sees the keys before it, as in decoding
    settle     x_i stays with probability min(1, p_i(x_i) / q_i(x_i)); the first one that does not is drawn anew from
               max(0, p_i - q_i), normalised, and what stands behind it is taken back

so that every token has the target's distribution p_i, filters, constraints and thought budget included, and greedy
texts are those of plain decoding. p_i is known only once the tokens before it are settled; q_i may be anything.

Sources: Leviathan et al. 2211.17192; Chen et al. 2302.01318.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from limbeck.config import checked
from limbeck.engine.drawing import invert_cumulative
from limbeck.errors import ConfigError


@checked
class SpeculativeConfig:
    """Who proposes tokens, and how many."""

    draft: str | None = None
    """Directory, alias or hub id of a model with the same vocabulary, say a distilled student; self: the served model,
    in int8 or cut by `layers`; null: nobody."""
    num_tokens: int = 3
    """Tokens proposed before each pass of the served model. On AVX2 a pass over 4 rows costs about what one costs."""
    layers: int | None = None
    """Use only so many of the draft's first blocks, with its norm and head; null: all."""
    precision: Literal["float32", "int8"] = "int8"
    """Of the draft's linear layers and head."""
    max_running: int = 4
    """With more texts under way, nothing is proposed: verifying is not free then. Sampled texts with a seed go on, so
    that they do not depend on the load."""

    def __post_init__(self) -> None:
        counts = (self.num_tokens, self.max_running, 1 if self.layers is None else self.layers)
        if min(counts) < 1:
            raise ConfigError("speculative: num_tokens, max_running and layers are 1 or more.")


class Proposal(NamedTuple):
    """A token of a draft."""

    token: int
    distribution: Tensor | None
    """[V] that it was drawn from; None at temperature 0."""


def settle(proposed: int, draft: Tensor, target: Tensor, uniform: float) -> int:
    """The proposed token, or one drawn in its place; over all proposals and numbers, distributed as the target's.

    P(stay) = min(1, p(x) / q(x)); else x' ~ max(0, p - q) / sum max(0, p - q)

    Args:
      proposed: x, drawn from `draft`.
      draft, target: q and p, probabilities [V].
      uniform: in [0, 1), independent of x; what is left of it after a refusal draws x'.
    Returns: a token; another one than x exactly if x was refused.
    Source: Chen et al. 2302.01318, theorem 1.
    """
    wanted, offered = float(target[proposed]), float(draft[proposed])
    if uniform * offered < wanted:
        return proposed
    share = wanted / offered
    rest = (target - draft).clamp_(min=0)
    # p and q that are equal up to rounding may leave nothing.
    cumulative = (rest if bool(rest.any()) else target).cumsum(0, dtype=torch.float64)
    goal = cumulative[-1:] * ((uniform - share) / (1 - share))
    return int(invert_cumulative(cumulative[None], goal))


@dataclass(slots=True)
class SpeculationStats:
    """Counters since the start."""

    drafts: int = 0
    """Passes that verified a text's proposals."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)
    """Accepted tokens by their place in the draft."""
    skipped_tokens: int = 0
    """Tokens drawn without a draft where one was set up: too many texts, or too long for the draft."""

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that were accepted."""
        return self.accepted_tokens / max(1, self.draft_tokens)

    @property
    def mean_length(self) -> float:
        """Tokens that a pass of the target brought a text, its own one included."""
        return 1 + self.accepted_tokens / max(1, self.drafts)

    def count(self, proposed: int, accepted: int) -> None:
        """Count a draft."""
        self.drafts += 1
        self.draft_tokens += proposed
        self.accepted_tokens += accepted
        self.accepted_at += [0] * (accepted - len(self.accepted_at))
        for place in range(accepted):
            self.accepted_at[place] += 1
