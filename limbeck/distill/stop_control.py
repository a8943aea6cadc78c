"""A controller that gives a cut run whole traces, or endings, when the student forgets how to stop.

Before every `every_steps`-th step the student answers held-out prompts, greedily. Where the share r that it ends by
itself is below the bound, the share s of traces that are left whole (or whose ending is re-attached) rises:

    s <- min(most, s + by)   if r < bound

What it writes is charged as `sampling`. The share is part of the saved state; what is measured follows from the
weights, so a resumed run goes on with the same bits. Own method; none was found in the literature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.config import checked
from limbeck.distill.moving_cut import Raised
from limbeck.distill.parallel import Ranks, sum_numbers
from limbeck.engine.complete import complete
from limbeck.engine.sampling import SamplingConfig
from limbeck.errors import ConfigError
from limbeck.ledger import Ledger, decoding_flops
from limbeck.models.anatomy import Sizes
from limbeck.traces.batch import Example
from limbeck.traces.sample import PROMPT


@checked
class StopControlConfig:
    """When the share of whole traces, or of endings, is raised, and how far."""

    bound: float = 0.9
    """Least share of held-out answers that end by themselves, 0 < x <= 1."""
    raises: Raised = "whole"
    """whole: more traces stay whole; ending: more get marker, answer and end of turn behind the cut."""
    by: float = 0.1
    """What the share rises by at a time, 0 < x <= 1."""
    most: float = 0.5
    """Where the share stays, 0 < x <= 1."""
    every_steps: int = 20
    """Steps between two looks; the first is before the first step."""
    num_prompts: int = 32
    """Held-out prompts that are answered, the first ones; fewer where fewer are held out."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; null takes the longest held-out response."""

    def __post_init__(self) -> None:
        for name in ("bound", "by", "most"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"stop_control.{name} must be in (0, 1]; found {getattr(self, name)}")
        for name in ("every_steps", "num_prompts", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"stop_control.{name} must be at least 1; found {value}")

    def is_due(self, step: int) -> bool:
        """Whether the student is looked at before `step`, counted from 0."""
        return step % self.every_steps == 0

    def raised(self, share: float, stop_rate: float) -> float:
        """The share behind a look that found `stop_rate`; one above `most` stays."""
        return max(share, min(self.most, share + self.by)) if stop_rate < self.bound else share

    def limit(self, held_out: Sequence[Example]) -> int:
        """Longest answer in tokens."""
        prompts = (int((example.sample.segment_ids == PROMPT).sum()) for example in held_out)
        longest = max(len(example) - prompt for example, prompt in zip(held_out, prompts, strict=True))
        return self.max_new_tokens or longest


class StopControl:
    """The share in force, and the prompts that it is found with."""

    def __init__(
        self, config: StopControlConfig, share: float, held_out: Sequence[Example], stop_ids: Sequence[int]
    ) -> None:
        """Start from `share`; `held_out` are whole examples, of which the prompts are asked."""
        self.share, self._config, self._stop_ids = share, config, stop_ids
        self._prompts = prompts_of(held_out[: config.num_prompts])
        self._sampling = SamplingConfig(max_new_tokens=config.limit(held_out))

    def look(self, step: int, model: Any, sizes: Sizes, ledger: Ledger, ranks: Ranks) -> dict[str, float]:
        """Raise the share where it is time and the student needs it; returns columns of metrics.jsonl."""
        if not self._config.is_due(step):
            return {"raised_share": self.share}
        mine = self._prompts[ranks.rank :: ranks.world_size]
        with ledger.phase("sampling"):
            found = [row[0] for row in complete(model, mine, self._sampling, self._stop_ids)]
        written = [len(completion.token_ids) for completion in found]
        ledger.count(rollout_tokens=sum(written))
        ledger.add_flops(sampling=sum(decoding_flops(sizes, len(p), [n]) for p, n in zip(mine, written, strict=True)))
        (stopped,) = sum_numbers([sum(completion.stopped for completion in found)], ranks)
        rate = stopped / len(self._prompts)
        self.share = self._config.raised(self.share, rate)
        return {"raised_share": self.share, "stop_rate": rate}


def prompts_of(examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of the prompts of whole examples."""
    return [e.sample.input_ids[e.sample.segment_ids == PROMPT].tolist() for e in examples]
