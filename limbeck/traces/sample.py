"""A rendered trace: token ids with their segments. Made once by `render`, read by everything after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PROMPT, COT, ANSWER, PADDING = 0, 1, 2, -1
SEGMENT_NAMES = ("prompt", "cot", "answer")


class Turn(NamedTuple):
    """One trained turn of a sample that has several: thought and answer, or answer alone."""

    start: int
    """Index of its first token."""
    ending: int
    """Index of the first token of its end marker, or of its answer when it has no thought."""
    stop: int
    """One past its last token."""
    weight: float = 1.0
    """What its tokens weigh in the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Tokens of one trace, with where its parts begin. T is its length."""

    input_ids: np.ndarray
    """int32 [T]."""
    segment_ids: np.ndarray
    """int8 [T]: PROMPT, COT or ANSWER for each token, never decreasing within a turn and the prompt before it."""
    ending_start: int
    """Index of the first token of the end marker, or of the answer when there is no thought; T when the thought stays
    open. End marker, answer and end of turn are `[ending_start:]`."""
    derivation_end: int | None = None
    """One past the token that completes the first derivation of the answer in the thought; None when not found."""
    probed_end: int | None = None
    """One past the last token of the earliest prefix from which a teacher already answers right (`traces probe`); None
    when the trace was not probed or no prefix will do."""
    trace_key: str = ""
    """`Trace.key` of its origin."""
    source: str = ""
    """`Trace.source` of its origin."""
    origin: int = 0
    """Number of the source that it was read from, where a run has several."""
    weight: float = 1.0
    """What it counts in a step's loss beside the other samples, >= 0."""
    turns: tuple[Turn, ...] = ()
    """Its trained turns, where they are several or weigh something; empty: one, behind the prompt."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def has_end_marker(self) -> bool:
        """Whether the thought is closed; False also when there is none."""
        return self.ending_start < len(self) and int(self.segment_ids[self.ending_start]) == COT
