"""Cuts that change from step to step: a horizon that grows, and traces that a controller leaves whole.

The cut of a step is a function of its number and of the share that the controller has raised, so a resumed run makes
the same ones, and a dry run makes them before there is any weight. Steps are planned on the longest cut, which is why
the number of steps must not hang on lengths.

Sources: on-policy, a growing horizon is POPD (arXiv 2605.31490) and Prefix OPD (2602.15260). Differs: here it is of
given traces, and linear in the share of their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np

from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.traces.batch import Example, make_example
from limbeck.traces.fit import fit_lengths, unit_lengths
from limbeck.traces.sample import Sample
from limbeck.traces.supervise import SupervisionConfig
from limbeck.traces.truncate import WITHOUT_FRACTION, TruncationConfig, exact_fraction, is_whole

Raised = Literal["whole", "ending"]


@checked
class CutScheduleConfig:
    """Move `truncation.lead_fraction` in a straight line to another value."""

    final_fraction: float | str = 1.0
    """Share of the tokens at the end of the schedule, 0 < x <= 1."""
    steps: int | None = None
    """Steps that the way takes; the share stays behind it. Null takes all steps of the run."""

    def __post_init__(self) -> None:
        exact_fraction(self.final_fraction)
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"cut_schedule.steps must be at least 1; found {self.steps}")


def fraction_at(first: Fraction, last: Fraction, step: int, steps: int) -> Fraction:
    """first + (last - first) min(1, step / (steps - 1)), exactly; `last` where there is one step.

    Args:
      step: number of the step, from 0.
      steps: steps of the schedule.
    """
    return last if step >= steps - 1 else first + (last - first) * Fraction(step, steps - 1)


class MovingCut(NamedTuple):
    """The cut of every step of a run."""

    samples: Sequence[Sample]
    """Whole traces that are trained on."""
    truncation: TruncationConfig
    """Where it starts."""
    supervision: SupervisionConfig
    schedule: CutScheduleConfig | None
    raised: Raised | None
    """What the traces get that a controller chooses; None where there is no controller."""
    lengths: np.ndarray
    """int64 [n]: tokens of the unit in each trace."""
    whole: np.ndarray
    """bool [n]: traces that stay whole anyway."""

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        truncation: TruncationConfig,
        supervision: SupervisionConfig,
        schedule: CutScheduleConfig | None,
        raised: Raised | None,
    ) -> MovingCut:
        """The cut of some traces, with what is looked up for every step."""
        whole = np.array([is_whole(sample, truncation) for sample in samples])
        return cls(samples, truncation, supervision, schedule, raised, unit_lengths(samples, truncation), whole)

    def at(self, step: int, steps: int) -> TruncationConfig:
        """The cut of step `step` of `steps`, fitted to all traces."""
        cut = self.truncation
        if self.schedule is not None:
            first, last = exact_fraction(cut.lead_fraction), exact_fraction(self.schedule.final_fraction)
            cut = replace(cut, lead_fraction=str(fraction_at(first, last, step, self.schedule.steps or steps)))
        return fit_lengths(cut, self.lengths, self.whole)

    def examples(self, step: int, steps: int, indices: Sequence[int], share: float = 0.0) -> list[Example]:
        """The examples of a step.

        Args:
          step, steps: its number and how many there are.
          indices: of its traces.
          share: of the traces, those that a controller leaves whole, or whose ending it re-attaches.
        """
        cut = self.at(step, steps)
        lifted = self._lifted(cut)
        chosen = TruncationConfig(whole_fraction=share, seed=cut.seed)
        return [
            make_example(sample, lifted if is_whole(sample, chosen) else cut, self.supervision)
            for sample in (self.samples[i] for i in indices)
        ]

    def longest(self) -> TruncationConfig:
        """The cut that keeps most of a trace, of those that a run may make: what its steps are planned on."""
        last = self.truncation.lead_fraction if self.schedule is None else self.schedule.final_fraction
        share = max(last, self.truncation.lead_fraction, key=exact_fraction)
        return self._lifted(fit_lengths(replace(self.truncation, lead_fraction=share), self.lengths, self.whole))

    def _lifted(self, cut: TruncationConfig) -> TruncationConfig:
        if self.raised is None:
            return cut
        return replace(cut, whole_fraction=1.0) if self.raised == "whole" else replace(cut, keep_ending=True)


def check_schedule(truncation: TruncationConfig) -> None:
    """Refuse a schedule for a cut that has no share.

    Raises: ConfigError.
    """
    if truncation.policy in WITHOUT_FRACTION or truncation.budget_tokens is not None:
        raise ConfigError(f"cut_schedule moves lead_fraction, which policy {truncation.policy} does not take here")
