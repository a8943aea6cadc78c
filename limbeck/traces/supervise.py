"""Supervision: a loss weight for every token, by segment, separately for CE and for KD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from limbeck.config import checked
from limbeck.errors import ConfigError, nearest
from limbeck.traces.sample import Sample

Preset = Literal["prompt+cot+answer", "cot+answer", "prompt+cot", "cot", "answer", "prompt+answer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentWeights:
    """Loss weight of every token of a segment; 0 leaves it out."""

    prompt: float = 0.0
    """Weight of prompt tokens, >= 0."""
    cot: float = 0.0
    """Weight of thought tokens, markers and blank line included, >= 0."""
    answer: float = 0.0
    """Weight of answer tokens, end-of-turn token included, >= 0."""

    def __post_init__(self) -> None:
        for name in ("prompt", "cot", "answer"):
            weight = getattr(self, name)
            if not (weight >= 0 and math.isfinite(weight)):
                raise ConfigError(f"{name} weight must be finite and at least 0; found {weight}")

    def of(self, segment_ids: np.ndarray) -> np.ndarray:
        """float32 weights for int segment ids; padding (-1) has weight 0."""
        table = np.array([self.prompt, self.cot, self.answer, 0.0], dtype=np.float32)
        return table[segment_ids]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSelection:
    """KD on the top share of each sequence's supervised positions only."""

    by: Literal["teacher_entropy", "divergence"]
    """teacher_entropy: where the teacher is least sure (SE-KD, arXiv 2602.01395); divergence: where the student is
    farthest from it (TIP, arXiv 2604.14084)."""
    fraction: float
    """Share of the KD positions that is kept in each sequence, 0 < x <= 1; at least one is."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"select.fraction must be in (0, 1]; found {self.fraction}")


@checked
class SupervisionConfig:
    """Which segments are supervised. The six presets are the paper's conditions; weights override them."""

    preset: Preset = "cot+answer"
    """prompt+cot+answer | cot+answer | prompt+cot | cot | answer | prompt+answer: weight 1 for the segments named."""
    ce: SegmentWeights | None = None
    """Weights of the cross-entropy term; the preset when not set."""
    kd: SegmentWeights | None = None
    """Weights of the distillation term; the preset when not set."""
    select: TokenSelection | None = None
    """Distil only the positions that matter most; null distils all."""

    def __post_init__(self) -> None:
        if self.preset not in get_args(Preset):
            raise ConfigError(f"unknown preset {self.preset!r}; {nearest(self.preset, get_args(Preset))}")

    def weights(self) -> tuple[SegmentWeights, SegmentWeights]:
        """The CE weights and the KD weights in force."""
        preset = SegmentWeights(**dict.fromkeys(self.preset.split("+"), 1.0))
        return self.ce or preset, self.kd or preset


def token_weights(sample: Sample, supervised: np.ndarray, config: SupervisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """CE and KD weight of every token as a target.

    Args:
      sample: a (cut) sample of n tokens.
      supervised: bool [n], which tokens may carry loss at all (from `truncate`).
      config: the segments' weights.
    Returns: two float32 [n]; the first token is never a target, so its weight is 0.
    """
    allowed = supervised.astype(np.float32)
    allowed[:1] = 0.0
    ce, kd = config.weights()
    return ce.of(sample.segment_ids) * allowed, kd.of(sample.segment_ids) * allowed
