"""A rendered trace: token ids with their segments. Made once by `render`, read by everything after it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

PROMPT, COT, ANSWER, PADDING = 0, 1, 2, -1
SEGMENT_NAMES = ("prompt", "cot", "answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Tokens of one trace, with where its parts begin. T is its length."""

    input_ids: np.ndarray
    """int32 [T]."""
    segment_ids: np.ndarray
    """int8 [T]: PROMPT, COT or ANSWER for each token, never decreasing."""
    ending_start: int
    """Index of the first token of the end marker; T when there is none. Marker, answer and end of turn are `[ending_start:]`."""
    derivation_end: int | None = None
    """One past the token that completes the first derivation of the verified answer in the thought; None when not found."""
    trace_key: str = ""
    """`Trace.key` of its origin."""
    source: str = ""
    """`Trace.source` of its origin."""

    def __len__(self) -> int:
        return len(self.input_ids)


def tokens_key(input_ids: np.ndarray) -> str:
    """Sixteen hex digits of a token sequence: the key under which teacher targets are stored."""
    return hashlib.sha256(np.ascontiguousarray(input_ids, dtype=np.int32).tobytes()).hexdigest()[:16]
