"""Reading an answer out of a completion, and checking it, with three verdicts: right, wrong, unknown.

Checks of mathematical equality parse what a model wrote, and a parser can be made to run for ever. They therefore run
in worker processes that are killed when an item takes too long; its verdict is then unknown, never a silent zero.
"""

from __future__ import annotations

import enum
import multiprocessing
import re
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Literal, NamedTuple

import math_verify

Style = Literal["exact", "last_number", "boxed", "auto"]
Check = Literal["exact", "math"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_SAID = re.compile(r"answer\s*(?:is|:)\s*\**\s*(.+?)(?:\.\s|\.?$|\n)", re.IGNORECASE)
_LONGEST_CHARS = 4000
"""A longer candidate is no short answer; it is wrong without being parsed."""


class Verdict(enum.StrEnum):
    """Outcome of a check."""

    RIGHT = "right"
    WRONG = "wrong"
    UNKNOWN = "unknown"


def extract_answer(text: str, style: Style) -> str | None:
    """The short answer in what follows the thought; None when the style finds none.

    Args:
      text: the completion behind the end marker.
      style: `exact` all of it, stripped; `boxed` the last \\boxed{}; `last_number` the last number; `auto` the last
        \\boxed{}, else what follows ####, else "the answer is", else a lone line, else the last number.
    """
    text = text.strip()
    if style == "exact":
        return text or None
    if style == "boxed":
        return _last_boxed(text)
    if style == "last_number":
        return _last_number(text)
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    if "####" in text:
        return text.rsplit("####", 1)[1].strip() or None
    said = _SAID.findall(text)
    if said:
        return said[-1].strip().strip("*$ ")
    return (text or None) if "\n" not in text and len(text) <= 40 else _last_number(text)


def check_exact(candidate: str, reference: str) -> Verdict:
    """Equality of the stripped strings, or of the numbers when both are plain ones ("1,080" and "1080.0")."""
    left, right = _normalise(candidate), _normalise(reference)
    return Verdict.RIGHT if left == right else Verdict.WRONG


def check_math(candidate: str, reference: str) -> Verdict:
    """Mathematical equality by math-verify. Call it through `AnswerChecker`: parsing may not end."""
    if check_exact(candidate, reference) is Verdict.RIGHT:
        return Verdict.RIGHT
    if len(candidate) > _LONGEST_CHARS:
        return Verdict.WRONG
    gold = math_verify.parse(_as_math(reference), parsing_timeout=None)
    found = math_verify.parse(_as_math(candidate), parsing_timeout=None)
    if not gold:
        return Verdict.UNKNOWN
    if not found:
        return Verdict.WRONG
    return Verdict.RIGHT if math_verify.verify(gold, found, timeout_seconds=None) else Verdict.WRONG


CHECKS = {"exact": check_exact, "math": check_math}


class _Worker(NamedTuple):
    process: Any
    pipe: Connection


class AnswerChecker:
    """Worker processes that check answers; a context manager.

    Args:
      check: `exact` or `math`.
      timeout_seconds: longest time an item may take before its worker is killed and its verdict is unknown.
      num_workers: processes.
    """

    def __init__(self, check: Check, timeout_seconds: float = 5.0, num_workers: int = 2) -> None:
        self._check, self._timeout, self._num_workers = check, timeout_seconds, num_workers
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._workers: list[_Worker] = []

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            _stop(worker)
        self._workers.clear()

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of (candidate, reference) pairs, in order."""
        verdicts = [Verdict.UNKNOWN] * len(pairs)
        waiting = list(range(len(pairs)))[::-1]
        while len(self._workers) < min(self._num_workers, len(pairs)):
            self._workers.append(self._start())
        busy: dict[Connection, tuple[int, _Worker]] = {}
        idle = list(self._workers)
        while waiting or busy:
            while waiting and idle:
                worker, index = idle.pop(), waiting.pop()
                worker.pipe.send(pairs[index])
                busy[worker.pipe] = (index, worker)
            ready = wait(list(busy), timeout=self._timeout)
            for pipe in ready or list(busy):
                index, worker = busy.pop(pipe)  # type: ignore[index]
                if ready and _received(worker, verdicts, index):
                    idle.append(worker)
                else:
                    idle.append(self._replace(worker))
        return verdicts

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._check), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _replace(self, worker: _Worker) -> _Worker:
        _stop(worker)
        self._workers.remove(worker)
        self._workers.append(self._start())
        return self._workers[-1]


def _received(worker: _Worker, verdicts: list[Verdict], index: int) -> bool:
    try:
        verdicts[index] = Verdict(worker.pipe.recv())
    except (EOFError, OSError):
        return False
    return True


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _serve(pipe: Connection, check: Check) -> None:
    while True:
        try:
            candidate, reference = pipe.recv()
        except EOFError:
            return
        try:
            verdict = CHECKS[check](candidate, reference)
        except Exception:  # a parser that raises has not decided anything
            verdict = Verdict.UNKNOWN
        pipe.send(str(verdict))


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for position in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip() or None
    return None


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def _normalise(text: str) -> str:
    plain = text.strip().strip("$").replace(",", "").strip()
    if re.fullmatch(r"[+-]?\d+(\.\d*)?", plain) and len(plain) < 300:
        whole, _, fraction = plain.lstrip("+").partition(".")
        fraction = fraction.rstrip("0")
        sign, digits = ("-", whole[1:]) if whole.startswith("-") else ("", whole)
        digits = digits.lstrip("0") or "0"
        number = digits + ("." + fraction if fraction else "")
        return number if number == "0" else sign + number
    return text.strip()


def _as_math(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"${text}$"
