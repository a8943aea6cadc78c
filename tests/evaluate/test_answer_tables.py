"""Verdicts over tables of written answers, and their agreement with math-verify and with filters in common use."""

from __future__ import annotations

import re

import math_verify
import pytest
from answer_tables import OPEN, RIGHT, WRONG

from limbeck.evaluate.answers import Verdict, extract_answer
from limbeck.evaluate.checking import check_answers


def judged(rows: list[tuple[str, str]]) -> list[Verdict]:
    return check_answers([(extract_answer(text, "auto", right), right) for text, right in rows], timeout_seconds=60.0)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(RIGHT, Verdict.RIGHT), (WRONG, Verdict.WRONG), (OPEN, Verdict.UNKNOWN)],
    ids=["right", "wrong", "open"],
)
def test_tables(rows: list[tuple[str, str]], expected: Verdict) -> None:
    found = judged(rows)
    others = [(row, verdict) for row, verdict in zip(rows, found, strict=True) if verdict is not expected]
    assert not others, others


def test_tables_are_large_and_have_no_row_twice() -> None:
    assert min(len(RIGHT), len(WRONG)) >= 120
    assert len({*RIGHT, *WRONG, *OPEN}) == len(RIGHT) + len(WRONG) + len(OPEN)


FORMULAS = [
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{3}", "\\frac{2}{6}"),
    ("\\frac{1}{3}", "\\frac{2}{5}"),
    ("x^2-1", "(x-1)(x+1)"),
    ("x^2+1", "(x-1)(x+1)"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("2\\sqrt{3}", "\\sqrt{13}"),
    ("\\frac{\\pi}{4}", "\\pi/4"),
    ("(1,2)", "(1,2)"),
    ("(1,2)", "(2,1)"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("[0,1)", "[0,1)"),
    ("[0,1)", "[0,1]"),
    ("10^3", "1000"),
    ("10^3", "100"),
    ("\\sin^2 x+\\cos^2 x", "1"),
    ("\\log_2 8", "3"),
    ("-\\frac{3}{4}", "-0.75"),
    ("1,000", "1000"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),
]


def test_verdicts_on_formulas_are_those_of_math_verify() -> None:
    theirs = [
        math_verify.verify(math_verify.parse(f"${right}$"), math_verify.parse(f"\\boxed{{{given}}}"))
        for given, right in FORMULAS
    ]
    ours = judged([(f"\\boxed{{{given}}}", right) for given, right in FORMULAS])
    assert ours == [Verdict.RIGHT if is_right else Verdict.WRONG for is_right in theirs]


def gsm8k(text: str) -> str | None:
    """The filters of the harness's GSM8K: the value behind #### , else the last number."""
    strict = re.search(r"#### (\-?[0-9\.\,]+)", text)
    if strict:
        return strict[1]
    loose = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return next((part for part in loose[-1] if part), None) if loose else None


def choice(text: str) -> str | None:
    """Its filters of multiple choice: behind "The answer is", else the last letter in brackets."""
    strict = re.search(r"(?<=The answer is )(.*)(?=.)", text)
    loose = re.findall(r"\(([A-Z])\)", strict[1] if strict else text)
    return loose[-1] if loose else None


def minerva(text: str) -> str | None:
    found = re.search(r"Final Answer: The final answer is(.*?). I hope it is correct.", text)
    return found[1].strip() if found else None


@pytest.mark.parametrize(
    ("harness", "text"),
    [
        (gsm8k, "She pays 3 * 4 = 12.\n#### 12"),
        (gsm8k, "She pays 3 * 4 = 12 and keeps 8.\n#### 8"),
        (gsm8k, "It was #### 1,024"),
        (gsm8k, "3 pens at $4 make 12 dollars"),
        (gsm8k, "3 pens at $4 are $12"),
        (gsm8k, "He goes from 10 down to -3"),
        (choice, "The answer is (B)."),
        (choice, "Since (A) fails, The answer is (C)."),
        (choice, "Not (A), not (B), so I take (D)."),
        (choice, "(A) is what I take"),
        (minerva, "Thus 12.\nFinal Answer: The final answer is $12$. I hope it is correct."),
        (minerva, "Final Answer: The final answer is $[2,5)$. I hope it is correct."),
        (minerva, "Final Answer: The final answer is $-\\frac{2}{3}$. I hope it is correct."),
    ],
)
def test_answers_that_the_filters_of_the_harness_find(harness, text: str) -> None:  # type: ignore[no-untyped-def]
    theirs = harness(text)
    assert theirs is not None
    reference = theirs.strip("$").rstrip(".")
    other = "E" if harness is choice else "123456"
    assert judged([(text, reference), (text, other)]) == [Verdict.RIGHT, Verdict.WRONG]
