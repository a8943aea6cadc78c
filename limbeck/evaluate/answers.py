"""Finding the answer in what a model wrote, and comparing it with the reference as text or as a number.

Everything here takes time linear in the text, whatever the text is.
"""

from __future__ import annotations

import enum
import re
import unicodedata
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from typing import Literal

AnswerStyle = Literal["auto", "boxed", "hashes", "phrase", "number", "exact"]
r"""Where the answer stands: last `\boxed{}`, after the last `####`, after the last "answer is", the last number, or the
whole text; auto takes the first of these that is there."""

MOST_NUMBER_CHARACTERS = 1000
"""Longer numerals are compared as text."""
_PHRASE = re.compile(r"\banswer\s+is\b[\s:*]*", re.IGNORECASE)
_NUMBER = re.compile(r"(?:(?<![\w)])-)?[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?(?:/[0-9]+)?")
_NUMERAL = re.compile(r"\\?\$?([-+]?)\\?\$?([0-9]+(?:,[0-9]{3})*|(?=\.))(\.[0-9]+)?\.?")
_WORD = re.compile(r"(?<!\\)\b[^\W\d_]{2,}")


class Verdict(enum.Enum):
    """What a check found."""

    RIGHT = "right"
    WRONG = "wrong"
    UNKNOWN = "unknown"
    """Not decided: no reference, or the check failed, hung or crashed."""


def answer_part(output: str, start_marker: str, end_marker: str, is_open: bool = False) -> str | None:
    """What a model wrote as its answer: the text after its thought, or all of it where there is no thought.

    Args:
      output: what the model wrote.
      start_marker, end_marker: around a thought.
      is_open: whether the prompt has opened the thought already.
    Returns: None when the thought is opened and never closed.
    """
    _, closes, rest = output.partition(end_marker)
    if closes:
        return rest
    return None if is_open or start_marker in output else output


def extract_answer(text: str, style: AnswerStyle = "auto") -> str | None:
    r"""The short answer in the text that follows a thought.

    Args:
      text: what the model wrote after the end marker.
      style: where the answer stands. `auto` takes the last \boxed{}, else what follows the last ####, else what follows
        the last "answer is" on that line (its first number when it goes on in words), else the whole text when it holds
        no words, else the last number, else the whole text.
    Returns: the answer without the blank space around it; None when there is none in that style.
    """
    if style != "auto":
        return _FINDERS[style](text) or None
    for marked in ("boxed", "hashes", "phrase"):
        found = _FINDERS[marked](text)
        if found:
            return found
    whole = text.strip("*$ \t\n")
    return (_last_number(text) if _WORD.search(whole) else None) or whole or None


def check_exact(candidate: object, reference: object) -> Verdict:
    """Equal as text after trimming and joining runs of blank space, or equal as decimal numbers (1,000.0 is 1000).

    Args:
      candidate: the extracted answer; None (no answer) is wrong.
      reference: the right answer; None is unknown.
    """
    right, given = _as_text(reference), _as_text(candidate)
    if right is None or not right.strip():
        return Verdict.UNKNOWN
    if candidate is None:
        return Verdict.WRONG
    if given is None:
        return Verdict.UNKNOWN
    given, right = _normalised(given), _normalised(right)
    if given == right:
        return Verdict.RIGHT
    numbers = _as_number(given), _as_number(right)
    return Verdict.RIGHT if None not in numbers and numbers[0] == numbers[1] else Verdict.WRONG


def _as_text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not (isinstance(value, int) and value.bit_length() > 8192):
        return str(value)
    return None


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).replace("\u2212", "-").split())


def _as_number(text: str) -> Decimal | None:
    match = _NUMERAL.fullmatch(text) if len(text) <= MOST_NUMBER_CHARACTERS else None
    if match is None or not (match[2] or match[3]):
        return None
    return Decimal(match[1] + (match[2].replace(",", "") or "0") + (match[3] or ""))


def _last_boxed(text: str) -> str | None:
    r"""The content of the \boxed{} (or \fbox{}) that begins last among those that are closed; one pass."""
    opened: list[int | None] = []
    begin, content = -1, None
    boxes = {match.end() for match in re.finditer(r"\\(?:boxed|fbox)[ \t]?\{", text)}
    for match in re.finditer(r"\\[{}\\]|[{}]", text):
        if match[0] == "{":
            opened.append(match.end() if match.end() in boxes else None)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start is not None and start > begin:
                begin, content = start, text[start : match.start()]
    return None if content is None else content.strip()


def _after_hashes(text: str) -> str | None:
    _, found, rest = text.rpartition("####")
    return _first_line(rest) if found else None


def _after_phrase(text: str) -> str | None:
    match = _last_match(_PHRASE, text)
    if match is None:
        return None
    line = _first_line(text[match.end() :]).rstrip(".*$").lstrip("$").strip()
    number = _NUMBER.search(line) if _WORD.search(line) else None
    return number[0] if number else line


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0].strip()


def _last_number(text: str) -> str | None:
    match = _last_match(_NUMBER, text)
    return None if match is None else match[0]


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


_FINDERS: dict[str, Callable[[str], str | None]] = {
    "boxed": _last_boxed,
    "hashes": _after_hashes,
    "phrase": _after_phrase,
    "number": _last_number,
    "exact": str.strip,
}
