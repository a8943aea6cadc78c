"""What may come next in a text: the thought's closing marker by force, a constraint behind the thought, and the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.engine.isolation import Watched
from limbeck.engine.jobs import Job, ThoughtBudget


class Thought:
    """Follows a text to its thought and through it.

    At most `budget.tokens` tokens stand between the markers: once so many are written, the rest of the closing marker
    is forced, of which the text may have begun some itself.
    """

    def __init__(self, budget: ThoughtBudget, at_start: bool) -> None:
        """`at_start`: the text has its thought there or not at all, and an opening marker once begun is finished."""
        self.budget, self._at_start = budget, at_start
        self._is_open, self._is_over = not budget.open_ids, False
        self._tail: list[int] = []
        """The text's last tokens, as many as the marker that is looked for has."""
        self._inside = 0

    @property
    def is_under_way(self) -> bool:
        """Whether the next token belongs to the thought, its markers included."""
        return self._is_open or (self._at_start and bool(self._tail))

    @property
    def may_open(self) -> bool:
        """Whether a constrained text may go on with the opening marker."""
        return not self._is_open and not self._is_over

    @property
    def forced(self) -> int | None:
        """The token that has to come now."""
        if self._is_open and self._inside >= self.budget.tokens:
            return self.budget.close_ids[_overlap(self._tail, self.budget.close_ids)]
        if self.is_under_way and not self._is_open:
            return self.budget.open_ids[len(self._tail)]
        return None

    def accept(self, token: int) -> bool:
        """Go on by a token. Returns: whether it belongs to the thought."""
        if self._is_over:
            return False
        if self._at_start and not self.is_under_way and token != self.budget.open_ids[0]:
            self._is_over = True
            return False
        marker = self.budget.close_ids if self._is_open else self.budget.open_ids
        self._tail = [*self._tail, token][-len(marker) :]
        self._inside += self._is_open
        if self._tail == list(marker):
            self._is_over, self._is_open, self._tail = self._is_open, not self._is_open, []
        return True


class Rules:
    """Those of one job, with their state."""

    def __init__(self, job: Job, stall_seconds: float) -> None:
        """`stall_seconds`: a constraint's next mask may take so long."""
        self._thought = None if job.thought is None else Thought(job.thought, job.constraint is not None)
        self._constraint = None if job.constraint is None else Watched(job.constraint, stall_seconds)
        self._end_tokens, self._min_tokens = job.end_tokens, job.min_tokens
        self._ends = torch.tensor(sorted(job.end_tokens), dtype=torch.int64)
        self._written = 0

    @property
    def forced(self) -> int | None:
        """The token that comes whatever the logits are."""
        return None if self._thought is None else self._thought.forced

    @property
    def are_free(self) -> bool:
        """Whether any token may come."""
        return self.forced is None and self._constraint is None and self._written >= self._min_tokens

    def are_ready(self, patience_seconds: float) -> bool:
        """Whether the next token can be drawn now, or within so long. Raises: Stalled where it never will be."""
        return self._constraint is None or self._is_thinking or self._constraint.is_ready(patience_seconds)

    def close(self) -> None:
        """The text is over."""
        if self._constraint is not None:
            self._constraint.close()

    @property
    def _is_thinking(self) -> bool:
        return self._thought is not None and self._thought.is_under_way

    def restrict_(self, logits: Tensor) -> None:
        """Put -inf in place of logits [V] that may not be drawn."""
        if self._constraint is not None and not self._is_thinking:
            self._constrain_(logits, self._constraint.allowed())
        # A text that ends within its thought would leave its constraint unmet.
        if self._written < self._min_tokens or (self._constraint is not None and self._is_thinking):
            ended = logits[self._ends]
            logits[self._ends] = -torch.inf
            if bool(logits.isneginf().all()):  # nothing but the end may follow
                logits[self._ends] = ended

    def _constrain_(self, logits: Tensor, allowed: Tensor | None) -> None:
        if allowed is None:
            return
        if self._thought is not None and self._thought.may_open:
            allowed = allowed.clone()
            allowed[self._thought.budget.open_ids[0]] = True
        logits.masked_fill_(~allowed, -torch.inf)

    def accept(self, token: int) -> bool:
        """Go on by a token. Returns: whether the text ends with it."""
        self._written += 1
        if token in self._end_tokens:
            return True
        is_thought = self._thought is not None and self._thought.accept(token)
        if self._constraint is None or is_thought:
            return False
        self._constraint.accept(token)
        return self._constraint.is_complete


def _overlap(text: Sequence[int], marker: Sequence[int]) -> int:
    """How many tokens of the marker's beginning the text ends with; less than all of it."""
    lengths = range(min(len(text), len(marker) - 1), 0, -1)
    return next((n for n in lengths if list(text[-n:]) == list(marker[:n])), 0)
