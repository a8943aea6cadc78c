"""Answers found, compared, and checked in processes that hang, crash and come back."""

from __future__ import annotations

import itertools
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from limbeck.errors import LimbeckError
from limbeck.evaluate import workers
from limbeck.evaluate.answers import Verdict, answer_part, extract_answer
from limbeck.evaluate.compare import check_exact
from limbeck.evaluate.workers import AnswerChecker

RIGHT, WRONG, UNKNOWN = Verdict.RIGHT, Verdict.WRONG, Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("output", "markers", "is_open", "expected"),
    [
        ("so 4\n</think>\n\n4", ("<think>", "</think>"), True, "\n\n4"),
        ("<think>so 4</think>4", ("<think>", "</think>"), False, "4"),
        ("<think>so 4", ("<think>", "</think>"), False, None),
        ("so 4", ("<think>", "</think>"), True, None),
        ("so 4", ("<think>", "</think>"), False, "so 4"),
        ("a</think>b</think>c", ("<think>", "</think>"), False, "b</think>c"),
        ("x<|end_of_thought|>y", ("<|begin_of_thought|>", "<|end_of_thought|>"), False, "y"),
        ("</think>", ("<think>", "</think>"), False, ""),
        ("", ("<think>", "</think>"), False, ""),
    ],
)
def test_answer_stands_behind_the_thought_or_is_everything(
    output: str, markers: tuple[str, str], is_open: bool, expected: str | None
) -> None:
    assert answer_part(output, *markers, is_open) == expected


@pytest.mark.parametrize(
    ("style", "text", "expected"),
    [
        ("boxed", r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{a{b{c}}d}", "a{b{c}}d"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{7} and \boxed{cut off", "7"),
        ("boxed", r"\boxed{\boxed{5}}", "5"),
        ("boxed", r"} \boxed{3}", "3"),
        ("boxed", r"\boxed{}", None),
        ("boxed", "42", None),
        ("hashes", "6 * 7 = 42\n#### 42\n", "42"),
        ("hashes", "#### 1\n#### 1,234 ", "1,234"),
        ("hashes", "42", None),
        ("hashes", "####", None),
        ("phrase", "The answer is 42.", "42"),
        ("phrase", "**The final answer is: 3/4**", "3/4"),
        ("phrase", "the answer is 42 apples, all told.", "42 apples"),
        ("phrase", "The answer is $x^2$.", "x^2"),
        ("phrase", "It is 42", None),
        ("number", "10-3=7", "7"),
        ("number", "from 1,234,567.5 on", "1,234,567.5"),
        ("number", "it fell to -3", "-3"),
        ("number", "2/3 of it", "2/3"),
        ("number", "none", None),
        ("exact", "  0 1 2 \n", "0 1 2"),
        ("exact", " \n", None),
        ("auto", "Thus 12.\n\\boxed{13}\n#### 14", "13"),
        ("auto", "so\n#### 14\nThe answer is 15", "14"),
        ("auto", "The answer is 15 and not 16", "15"),
        ("auto", "0 1 2", "0 1 2"),
        ("auto", "x^2 + 1", "x^2 + 1"),
        ("auto", r"\frac{1}{2}", r"\frac{1}{2}"),
        ("auto", "**4**", "4"),
        ("auto", "Seven apples cost 21", "21"),
        ("auto", "Paris", "Paris"),
        ("auto", "", None),
    ],
)
def test_extraction(style: str, text: str, expected: str | None) -> None:
    assert extract_answer(text, style) == expected


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 100_000,
        "{" * 200_000 + "}" * 200_000,
        "\\boxed{" * 50_000 + "}" * 50_000,
        "the answer is " * 50_000,
        "the answer" + " " * 500_000,
        "1" * 500_000,
        "1," * 250_000,
        "-" * 300_000,
        "1/" * 200_000,
        "#" * 400_000,
        "**" * 200_000,
        "\\" * 400_000,
        "\u0661\u0662 \ud800 \U0001f600" * 50_000,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_extraction_is_linear(text: str) -> None:
    start = time.process_time()
    for style in ("auto", "boxed", "hashes", "phrase", "number", "exact"):
        extract_answer(text, style)
    check_exact(text, text[:-1])
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("4", "4", RIGHT),
        (" 4\n", "4", RIGHT),
        ("4", "5", WRONG),
        ("1,000.0", "1000", RIGHT),
        ("$18", "18", RIGHT),
        ("-$18.50", "-18.5", RIGHT),
        (".5", "0.50", RIGHT),
        ("42.", "42", RIGHT),
        ("\u22123", "-3", RIGHT),
        ("-0", "0", RIGHT),
        ("1,00", "100", WRONG),
        (".", "0", WRONG),
        ("0  1\n2", "0 1 2", RIGHT),
        ("a", "A", RIGHT),
        ("5 pieces", "5 apples", UNKNOWN),
        ("e\u0301", "\u00e9", RIGHT),
        ("x\u00b2", "x2", UNKNOWN),
        ("1e3", "1000", RIGHT),
        ("9" * 2000, "9" * 2000, RIGHT),
        ("9" * 2000, "9" * 2001, WRONG),
        (4, "4", RIGHT),
        ("4", 4.0, RIGHT),
        (None, "4", WRONG),
        ("", "4", WRONG),
        ("4", None, UNKNOWN),
        (None, None, UNKNOWN),
        ("4", " ", UNKNOWN),
        (10**5000, "4", UNKNOWN),
        (["4"], "4", UNKNOWN),
        (b"4", "4", UNKNOWN),
    ],
    ids=itertools.count(),
)
def test_exact_check(candidate: object, reference: object, expected: Verdict) -> None:
    assert check_exact(candidate, reference) is expected


def test_exact_checks_in_workers_keep_their_order() -> None:
    pairs = [(str(i), str(i if i % 3 else i + 1)) for i in range(50)]
    ended: list[int] = []
    with AnswerChecker("exact", timeout_seconds=60.0) as checker:
        verdicts = checker.verdicts([*pairs, (object(), "1"), (None, "1"), ("1", None)], ended.append)
        assert checker.verdicts([]) == []
    assert verdicts == [RIGHT if i % 3 else WRONG for i in range(50)] + [UNKNOWN, WRONG, UNKNOWN]
    assert sum(ended) == 53


def test_math_checks() -> None:
    cases = [
        (r"\frac{1}{2}", "0.5", RIGHT),
        ("1/2", r"\frac{2}{4}", RIGHT),
        ("x+1", "1+x", RIGHT),
        (r"2\sqrt{2}", r"\sqrt{8}", RIGHT),
        ("1,234", "1234", RIGHT),
        ("x+1", "x-1", WRONG),
        ("0.5001", "0.5", WRONG),
        (None, "0.5", WRONG),
        ("the cat", "0.5", UNKNOWN),
        ("0.5", None, UNKNOWN),
    ]
    with AnswerChecker("math", timeout_seconds=60.0, num_workers=1) as checker:
        verdicts = checker.verdicts([(candidate, reference) for candidate, reference, _ in cases])
    assert verdicts == [expected for _, _, expected in cases]


QUICK_HOSTILE = [
    "9**9**9**9",
    "(" * 5000 + "1" + ")" * 5000,
    r"\frac{1}{" * 800 + "1" + "}" * 800,
    "{" * 50_000,
    "1" * 100_000,
    "a" * 50_000 + "!",
    "1+" * 3000 + "1",
    "\ud800\U0001f600\x00\u202e",
    "__import__('os')._exit(3)",
    "\n\n\x1e" * 100,
]
HANGING = [
    "1000000!!!!",
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    r"\int_0^\infty e^{-x^{x^{x}}} dx",
    r"\sum_{n=1}^{10^{12}} n^{n}",
    "(" * 900 + "1" + ")" * 900,
    r"\sqrt{" * 300,
    "1+" * 900 + "1",
]


@pytest.mark.parametrize("num_hanging", [1, pytest.param(len(HANGING), marks=pytest.mark.slow)])
def test_hostile_answers_get_a_verdict_in_time(num_hanging: int) -> None:
    hostile = [*HANGING[:num_hanging], *QUICK_HOSTILE]
    timeout_seconds = 4.0
    with AnswerChecker("math", timeout_seconds, num_workers=1) as checker:
        assert checker.verdicts([("1", "1")]) == [RIGHT]
        start = time.monotonic()
        verdicts = checker.verdicts([(text, "7") for text in hostile] + [("14/2", "7")])
        seconds = time.monotonic() - start
    assert verdicts[-1] is RIGHT
    assert verdicts[0] is UNKNOWN
    assert RIGHT not in verdicts[:-1]
    # An item that hangs costs its timeout and the start of a new worker, which is slow where the machine is loaded.
    assert seconds < (num_hanging + 1) * (timeout_seconds + 40.0)


@pytest.fixture
def check_that_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    source = """
        import os, time
        from limbeck.evaluate.compare import check_exact
        print("noise on standard output")
        def check(candidate, reference):
            print("more noise")
            if candidate == "hang":
                time.sleep(1000)
            if candidate == "exit":
                os._exit(1)
            if candidate == "kill":
                os.kill(os.getpid(), 9)
            if candidate == "raise":
                raise RuntimeError("no")
            if candidate == "memory":
                bytearray(1 << 40)
            if candidate == "recursion":
                return check_that_recurses(0)
            if candidate == "quit":
                raise SystemExit
            return check_exact(candidate, reference)
        def check_that_recurses(depth):
            return check_that_recurses(depth + 1)
    """
    (tmp_path / "breaking.py").write_text(textwrap.dedent(source), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(workers.CHECKS, "breaking", ("breaking", "check"))
    yield
    sys.modules.pop("breaking", None)


def test_broken_checks_are_unknown_and_workers_come_back(check_that_breaks: None) -> None:
    bad = ["hang", "exit", "kill", "raise", "memory", "recursion", "quit"]
    pairs = [pair for name in bad for pair in ((name, name), ("4", "4"), ("5", "4"))]
    verdicts: list[Verdict] = []

    def work() -> None:
        with AnswerChecker("breaking", timeout_seconds=3.0) as checker:  # type: ignore[arg-type]
            verdicts.extend(checker.verdicts(pairs))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(200)
    assert not thread.is_alive()
    assert verdicts == [UNKNOWN, RIGHT, WRONG] * len(bad)


def test_workers_are_gone_afterwards(check_that_breaks: None) -> None:
    with AnswerChecker("breaking", timeout_seconds=60.0) as checker:  # type: ignore[arg-type]
        checker.verdicts([("4", "4")])
        processes = [worker._process for worker in checker._workers]
        assert all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)


def test_check_that_cannot_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workers.CHECKS, "missing", ("no_such_module_here", "check"))
    with (
        pytest.raises(LimbeckError, match="'missing' does not start: ModuleNotFoundError: No module named"),
        AnswerChecker("missing") as checker,  # type: ignore[arg-type]
    ):
        checker.verdicts([("4", "4")])
