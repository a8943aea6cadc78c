"""When a step trains on what the student writes, and how that is sampled."""

from __future__ import annotations

import math

from limbeck.config import checked
from limbeck.distill.divergence import DivergenceConfig
from limbeck.engine.sampling import SamplingConfig
from limbeck.errors import ConfigError


@checked
class OnPolicyConfig(SamplingConfig):
    """Training on what the student writes itself. One recipe holds both stages: given traces first, then rollouts."""

    start_fraction: float | None = 0.5
    """Share of the steps that train on given traces first; 0 is purely on-policy, 1 or null never on-policy."""
    fraction: float = 1.0
    """Share of the steps after that that train on rollouts, 0 < x <= 1; the others keep to the given traces."""
    temperature: float = 0.9
    """Sampling temperature of the rollouts, > 0; 0.8 to 0.9 serve best (2502.14305)."""
    max_new_tokens: int = 300
    """Longest rollout in tokens. A few tokens are rollouts of prefixes only (2602.15260)."""
    first_new_tokens: int | None = None
    """Longest rollout at the first on-policy step in tokens, >= 1; from there it grows in a straight line to
    max_new_tokens at the last step (a progressive horizon, 2605.31490). Null: max_new_tokens from the start."""
    max_staleness_steps: int | None = 0
    """Most optimizer steps between the weights that wrote a rollout and those it trains; null writes all rollouts once,
    at the first on-policy step (offline on-policy distillation)."""
    batch_size: int = 64
    """Sequences decoded at once."""
    importance_limit: float | None = None
    """With precision int8: weigh the loss of each token with the student's probability of it over the sampler's, at
    most so much (truncated importance weights); null does not."""
    mask_special_tokens: bool = True
    """No loss where the student wrote a special token, except the end of turn and the markers, which it must learn."""
    divergence: DivergenceConfig | None = None
    """Divergence on rollouts; null takes the one of the given traces."""
    length_warning_factor: float = 1.5
    """Say so when rollouts are longer in the mean than this many times the given responses (length inflation)."""

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        if self.start_fraction is not None and not 0 <= self.start_fraction <= 1:
            raise ConfigError(f"on_policy.start_fraction must be in [0, 1] or null; found {self.start_fraction}")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"on_policy.fraction must be in (0, 1]; found {self.fraction}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"on_policy.temperature must be finite and above 0; found {self.temperature}")
        if self.max_staleness_steps is not None and self.max_staleness_steps < 0:
            raise ConfigError(
                f"on_policy.max_staleness_steps must be 0 or more, or null; found {self.max_staleness_steps}"
            )
        if self.first_new_tokens is not None and not 1 <= self.first_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"on_policy.first_new_tokens must be in 1 to max_new_tokens ({self.max_new_tokens}); found "
                f"{self.first_new_tokens}"
            )
        if not self.length_warning_factor > 0:
            raise ConfigError(f"on_policy.length_warning_factor must be above 0; found {self.length_warning_factor}")
        self._check_importance()

    def _check_importance(self) -> None:
        if self.importance_limit is None:
            return
        if self.precision != "int8" or self.top_p < 1:
            raise ConfigError(
                "on_policy.importance_limit needs precision int8, since an exact sampler is the student itself, "
                "and top_p 1, since there is no ratio outside a nucleus"
            )
        if not self.importance_limit >= 1:
            raise ConfigError(f"on_policy.importance_limit must be at least 1; found {self.importance_limit}")

    def first_step(self, total_steps: int) -> int:
        """The step (0-based) at which the second stage begins; `total_steps` when there is none."""
        return total_steps if self.start_fraction is None else round(self.start_fraction * total_steps)

    def is_on_policy(self, step: int, total_steps: int) -> bool:
        """Whether `step` trains on rollouts: of the first n steps of the second stage, ceil(fraction n) do."""
        since = step - self.first_step(total_steps)
        return since >= 0 and math.ceil((since + 1) * self.fraction) > math.ceil(since * self.fraction)

    def new_tokens_at(self, step: int, total_steps: int) -> int:
        """Longest rollout in tokens of what is written at `step`."""
        if self.first_new_tokens is None:
            return self.max_new_tokens
        first = self.first_step(total_steps)
        steps = max(1, total_steps - 1 - first)
        return self.first_new_tokens + (self.max_new_tokens - self.first_new_tokens) * (step - first) // steps

    def written_at(self, step: int, total_steps: int) -> int:
        """The step whose weights write the rollouts of an on-policy `step`: the first such one of its window."""
        return next(n for n in self.window(step, total_steps) if self.is_on_policy(n, total_steps))

    def window(self, step: int, total_steps: int) -> range:
        """The steps that share the rollouts of an on-policy `step`; weights are at most `max_staleness_steps` old."""
        if self.max_staleness_steps is None:
            return range(self.first_step(total_steps), total_steps)
        start, length = self.first_step(total_steps), self.max_staleness_steps + 1
        begin = start + (step - start) // length * length
        return range(begin, min(begin + length, total_steps))
