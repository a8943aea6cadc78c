"""Answers to verdicts: by plain rules here, and where none decides by mathematics, in processes that can be killed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from limbeck.evaluate.answers import Verdict
from limbeck.evaluate.compare import compare
from limbeck.evaluate.workers import AnswerChecker

CheckName = Literal["exact", "math"]
Pair = tuple[str | None, str | None]
"""The extracted answer and the reference."""


def _filled(
    verdicts: Sequence[Verdict | None], places: Sequence[int], later: Sequence[Verdict]
) -> list[Verdict | None]:
    """The verdicts with later ones in their places."""
    known = dict(zip(places, later, strict=True))
    return [known.get(place, verdict) for place, verdict in enumerate(verdicts)]


def check_answers(
    pairs: Sequence[Pair],
    checker: CheckName = "math",
    timeout_seconds: float = 10.0,
    num_workers: int = 2,
    advance: Callable[[int], Any] | None = None,
) -> list[Verdict]:
    """The verdict of every pair, in order.

    Args:
      pairs: extracted answers (None is no answer) and references (None makes the verdict unknown).
      checker: exact leaves unknown what plain rules do not decide; math asks math-verify.
      timeout_seconds: wall-clock time for one pair that math-verify is asked about.
      num_workers: processes that ask it; none are started where every pair is decided by rules.
      advance: called with the number of pairs that have just been decided.
    """
    found = [compare(candidate, reference) for candidate, reference in pairs]
    left = [place for place, verdict in enumerate(found) if verdict is None and checker == "math"]
    if advance is not None:
        advance(len(pairs) - len(left))
    if left:
        asked = [pairs[place] for place in left]
        with AnswerChecker("math", timeout_seconds, min(num_workers, len(left))) as workers:
            found = _filled(found, left, workers.verdicts(asked, advance))
    return [verdict or Verdict.UNKNOWN for verdict in found]
