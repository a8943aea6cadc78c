"""Mathematical equality of two answers, by math-verify. Imported by answer workers only: sympy is slow to load."""

from __future__ import annotations

import math_verify
from sympy import Basic, MatrixBase  # type: ignore[import-untyped]

from limbeck.evaluate.answer_forms import plain, without_unit
from limbeck.evaluate.answers import Verdict
from limbeck.evaluate.compare import compare, short

MOST_CHARACTERS = 2000
"""Longer candidates are not parsed: no answer is that long, and the parser takes minutes."""


def check_math(candidate: object, reference: object) -> Verdict:
    """As plain rules decide (`compare`), else equal as parsed mathematics.

    May hang or take all memory on hostile input: run it in an `AnswerChecker`, whose workers are killed. math-verify's
    own timeouts are off, because they work by signals in the main thread and turn a timeout into "not equal".

    Args:
      candidate: the extracted answer; None (no answer) is wrong, one of more than MOST_CHARACTERS is unknown.
      reference: the right answer; None, or one that cannot be parsed and is not equal as text, gives unknown.
    Raises: whatever math-verify raises while it compares.
    """
    decided = compare(candidate, reference)
    if decided is not None:
        return decided
    if len(str(candidate)) > MOST_CHARACTERS:
        return Verdict.UNKNOWN
    right, given = _parse(_formula(short(str(reference)))), _parse(_formula(str(candidate)))
    if not any(isinstance(part, Basic | MatrixBase) for part in right):
        return Verdict.UNKNOWN
    is_equal = math_verify.verify(right, given, timeout_seconds=None, raise_on_error=True)
    return Verdict.RIGHT if is_equal else Verdict.WRONG


def _formula(text: str) -> str:
    return without_unit(plain(text))[0]


def _parse(text: str) -> list:
    delimited = text if "\\boxed" in text or "$" in text else f"\\boxed{{{text}}}"
    return math_verify.parse(delimited, parsing_timeout=None, raise_on_error=True)
