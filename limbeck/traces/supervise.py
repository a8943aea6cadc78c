"""Supervision: a loss weight for every token, by segment, separately for CE and for KD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from limbeck.config import checked
from limbeck.errors import ConfigError, nearest
from limbeck.traces.sample import Sample
from limbeck.traces.sample_weight import SampleWeightConfig

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
    """KD on the positions of each sequence that matter most, or most on those."""

    by: Literal["random", "teacher_entropy", "student_entropy", "divergence", "student_entropy+divergence", "tip"]
    """student_entropy: where the student is least sure (SE-KD, arXiv 2602.01395); tip: there, or where it is sure and
    far from the teacher (TIP, arXiv 2604.14084); divergence: where it is farthest; student_entropy+divergence: both
    added; teacher_entropy: where the teacher is least sure; random: the twin that any other must beat."""
    fraction: float | None = None
    """Share of the KD positions that is kept in each sequence, 0 < x <= 1; at least one is. Null keeps all, each with a
    weight in proportion to its score."""
    seed: int = 0
    """Seed of random, >= 0."""

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"select.fraction must be in (0, 1] or null; found {self.fraction}")
        if self.seed < 0:
            raise ConfigError(f"select.seed must be at least 0; found {self.seed}")

    @property
    def reads_student(self) -> bool:
        """Whether the score needs a pass through the student's head."""
        return self.by not in ("random", "teacher_entropy")

    @property
    def reads_divergence(self) -> bool:
        """Whether the score is made of the divergence."""
        return self.by in ("divergence", "student_entropy+divergence", "tip")

    @property
    def reads_teacher(self) -> bool:
        """Whether the score needs a pass through the teacher's head."""
        return self.reads_divergence or self.by == "teacher_entropy"

    def head_passes(self, teachers: int) -> int:
        """Passes of all positions through the student's head: one for the entropy, one a teacher for the divergence."""
        return (self.by != "divergence") * self.reads_student + teachers * self.reads_divergence


AtBorders = Literal["none", "kd"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BorderConfig:
    """CE where it is open whether the teacher stops."""

    ce: AtBorders = "none"
    """none: no CE there; kd: its weight goes to the KD term."""
    probability: float = 0.05
    """x: a border is where the teacher ends thought or turn with a probability in [x, 1 - x], 0 < x < 0.5."""

    def __post_init__(self) -> None:
        if not 0 < self.probability < 0.5:
            raise ConfigError(f"borders.probability must be in (0, 0.5); found {self.probability}")


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
    borders: BorderConfig | None = None
    """Take CE from where the teacher may stop, so that a cut trace does not teach to go on; null leaves it."""
    sample_weight: SampleWeightConfig | None = None
    """Weigh every trace by a column of its record, such as the rate at which its problem is solved; null: alike."""

    def __post_init__(self) -> None:
        if self.preset not in get_args(Preset):
            raise ConfigError(f"unknown preset {self.preset!r}; {nearest(self.preset, get_args(Preset))}")

    def weights(self) -> tuple[SegmentWeights, SegmentWeights]:
        """The CE weights and the KD weights in force."""
        preset = SegmentWeights(**dict.fromkeys(self.preset.split("+"), 1.0))
        return self.ce or preset, self.kd or preset


def token_weights(sample: Sample, allowed: np.ndarray, config: SupervisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """CE and KD weight of every token as a target.

    Args:
      sample: a (cut) sample of n tokens.
      allowed: bool or float32 [n], which tokens may carry loss and what they stand for (`Cut.loss_weight`).
      config: the segments' weights; those of its turns are multiplied by them.
    Returns: two float32 [n]; the first token is never a target, so its weight is 0.
    """
    allowed = np.array(allowed, dtype=np.float32)
    allowed[:1] = 0.0
    for turn in sample.turns:
        allowed[turn.start : turn.stop] *= turn.weight
    ce, kd = config.weights()
    return ce.of(sample.segment_ids) * allowed, kd.of(sample.segment_ids) * allowed
