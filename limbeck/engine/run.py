"""A job under way: its text, and by which rules and random numbers it is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from limbeck.engine.context import Behind, Context, Prompt
from limbeck.engine.jobs import Drawn, FinishReason, Job
from limbeck.engine.prefix_cache import PrefixCache
from limbeck.engine.rules import Rules


class Run(Context):
    """One job. It reads its prompt, then writes."""

    def __init__(
        self, job: Job, prompt: Prompt, behind: Behind, cache: PrefixCache, keeps_text: bool, stall_seconds: float
    ) -> None:
        super().__init__(prompt, job.max_tokens, behind, cache, keeps_text)
        self.job, self.rules = job, Rules(job, stall_seconds)
        self.finish: FinishReason | None = None if job.max_tokens else "length"
        """Why the text is over, once it is."""
        self._random = np.random.Generator(np.random.PCG64(job.sampling.seed))
        self._uniform: float | None = None
        self._reads = prompt.users == 1
        self._echo: list[Drawn] = [Drawn(job.prompt[0], None, ())] if job.is_echoed else []

    @property
    def left_tokens(self) -> int:
        """That may still be written."""
        return len(self.job.prompt) + self.job.max_tokens - len(self.tokens)

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, not computed for this job: all where another one has the same."""
        return self.prompt.cached_tokens if self._reads else len(self.job.prompt)

    def uniform(self) -> float:
        """The next token's random number in [0, 1), which depends on seed and place alone."""
        if self._uniform is None:
            self._uniform = float(self._random.random())
        return self._uniform

    def accept(self, token: int) -> None:
        """Write a token."""
        self._uniform = None
        self.tokens.append(token)
        if self.rules.accept(token):
            self.finish = "stop"
        elif not self.left_tokens:
            self.finish = "length"

    def echo(self, drawn: Sequence[Drawn]) -> None:
        """Log-probs of further tokens of the prompt."""
        self._echo += drawn

    def release(self) -> None:
        """Let go of all that the text holds."""
        super().release()
        self.rules.close()

    def take_echo(self) -> Sequence[Drawn]:
        """Log-probs of the prompt, the first time only."""
        echo, self._echo = self._echo, []
        return echo
