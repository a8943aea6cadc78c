"""How tokens are drawn: of one text, and of many at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from limbeck.config import checked
from limbeck.errors import ConfigError

GREEDY_BELOW = 1e-5
"""Temperatures whose limit, the most likely token, is taken: divided by less, logits leave float32's range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is drawn from the logits."""

    temperature: float = 1.0
    """0, or less than GREEDY_BELOW, takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens that have this share of the most likely one's probability."""
    seed: int | tuple[int, ...] | None = None
    """Same seed and prompt, same text, whatever else is in the batch; null: another one each time."""

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    def check(self) -> None:
        """Raises: ConfigError for numbers that mean nothing."""
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or more; found {self.temperature}.")
        if self.top_k < 0 or not 0.0 < self.top_p <= 1.0 or not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(
                f"top_k {self.top_k}, top_p {self.top_p}, min_p {self.min_p}; needed are top_k >= 0, "
                "0 < top_p <= 1 and 0 <= min_p <= 1."
            )
        if isinstance(self.seed, int) and self.seed < 0:
            raise ConfigError(f"seed must be 0 or more; found {self.seed}.")


@checked
class SamplingConfig:
    """How many texts are written, and how."""

    max_new_tokens: int = 512
    """Longest completion in tokens; a text also ends where the model's context ends."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this share of the probability."""
    num_samples: int = 1
    """Completions of each prompt."""
    batch_size: int = 128
    """Sequences decoded at once."""
    precision: Literal["float32", "int8"] = "float32"
    """Of the products while writing: float32 is exact; int8 rounds weights and inputs, for several times the speed on
    a CPU."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; found {getattr(self, name)}")
        self.draws(0).check()
        if self.temperature == 0.0 and self.num_samples > 1:
            raise ConfigError("num_samples above 1 needs a temperature above 0: greedy samples are all the same")

    def draws(self, *seed: int) -> Sampling:
        """The way of one text."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=seed)


@checked
class SeededSampling(SamplingConfig):
    """The same with a seed of its own."""

    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more; found {self.seed}")
