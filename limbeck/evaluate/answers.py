"""Finding the answer in what a model wrote, as people and graders write it.

Everything here takes time linear in the text, whatever the text is.
"""

from __future__ import annotations

import enum
import re
from collections import deque
from collections.abc import Callable
from typing import Literal

from limbeck.evaluate.answer_forms import choice_of, is_mathematics, list_of, number_of, plain, range_of
from limbeck.traces.boxed import last_box

AnswerStyle = Literal["auto", "boxed", "tag", "hashes", "phrase", "number", "letter", "exact"]
r"""Where the answer stands: last `\boxed{}`, last `<answer>`, after the last `####`, after the last "answer is" or
"Answer:", the last number, the last letter of a choice, or the whole text; auto takes the first that is there."""

_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.IGNORECASE | re.DOTALL)
_PHRASE = re.compile(
    r"(?P<before>\b(?:if|whether|unless|hope|when|this|your|that|an|any|sure)\s+(?:that\s+)?(?:the\s+)?)?"
    r"(?:\b(?:final|correct|right|best)[ \t]+)?\b(?:answer|option|choice)(?:\(s\)|s)?[*_`]{0,4}"
    r"(?:[ \t]+(?:to|for|of)[ \t]+[^.:\n]{1,60}?)?"
    r"(?:[ \t]{0,4}[*_]{0,3}[:=][*_]{0,3}"
    r"|[ \t]{1,4}(?:is|are|would be|should be|must be|will be)(?:n['’]t|[ \t]+not)?\b[ \t]{0,4}:?)"
    r"|答案[ \t]?(?:是|为|為|[:：])"
    r"|\b(?:antwort|r[ée]ponse|respuesta|risposta|resposta|ответ)[ \t]?(?:ist|est|es|è|é)?[ \t]?[:：]",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"^[ \t#*_]{0,12}(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t*_:.]{0,8}$", re.IGNORECASE | re.MULTILINE
)
_IS_NO_VALUE = re.compile(
    r"(?:not|helpful|unclear|clear|correct|incorrect|right|wrong|obvious|below|above|that|as|in|to|of|the same|useful|"
    r"therefore|thus|given|found|obtained|what|because)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?:(?<![\w)])-)?[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?(?:[/:][0-9]+)?(?:\\?%)?")
_LETTER = re.compile(r"\(([A-J])\)|(?<![\w'’\\{$])([A-J])(?=[).:]?(?:\s*$|[).:]))")
_QUANTITY = re.compile(r"(?:[0-9][0-9.,]* ?[A-Za-z]+,? ?(?:and )?){2,4}")
_CALLED_RIGHT = re.compile(
    r"(?:\(([A-J])\)|\b([A-J]))(?:[).])? is (?:the |my )?(?:correct|right|best|answer)\b(?! not)", re.IGNORECASE
)
_WORD = re.compile(r"(?<!\\)\b[^\W\d_]{2,}")
_SENTENCE_END = re.compile(r"[.!?](?=[*_`\"')\]]{0,3}(?:\s|$))")
_ABBREVIATED = re.compile(
    r"\b(?:[Dd]r|[Mm]rs?|[Mm]s|[Ss]t|[JS]r|[Nn]o|vs|approx|e\.g|i\.e|(?:[A-Z]\.)+[A-Z]|Mt|Inc|Ltd)$"
)
_ASIDE = re.compile(
    r",? \(?(?:because|since|rather than|instead of|and not|but not|not|so that|which|as shown|as required|where)\b"
    r"|, (?:all told|in total|so|as)\b|\s+[-–—]{1,2}\s+(?=[A-Za-z])",
    re.IGNORECASE,
)
MOST_VALUE_CHARACTERS = 80
_DATE = re.compile(
    r"\d{4}-\d\d?-\d\d?|\d\d?/\d\d?/\d{2,4}|^\d\d?:\d\d\b"
    r"|^(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.? \d",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"\(?[A-J](?:[).:]|$)")


class Verdict(enum.Enum):
    """What a check found."""

    RIGHT = "right"
    WRONG = "wrong"
    UNKNOWN = "unknown"
    """Not decided: no reference, no rule that can tell, or the check failed, hung or crashed."""


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


def extract_answer(text: str, style: AnswerStyle = "auto", reference: str | None = None) -> str | None:
    r"""The short answer in the text that follows a thought.

    Args:
      text: what the model wrote after the end marker.
      style: where the answer stands. `auto` takes the last \boxed{} or <answer>, else what follows the last ####, else
        what follows the last "answer is", "Answer:" or its like, up to the end of the sentence, else the whole text
        when it holds no words or is a choice ("B. Paris"), else the last number, else the whole text.
      reference: the right answer. Only its kind matters: of a choice (A to J), the last letter stands before a number.
    Returns: the answer without the blank space around it; None when there is none in that style.
    """
    if style != "auto":
        return _FINDERS[style](text) or None
    for marked in ("marked", "hashes", "phrase"):
        if found := _FINDERS[marked](text):
            return found
    return _nowhere_marked(text, reference)


def _nowhere_marked(text: str, reference: str | None) -> str | None:
    """The whole text where it is an answer, else the choice or the number that it ends with."""
    whole = text.strip("* \t\n")
    if _is_one_value(whole):
        return whole
    whole = whole.strip("*$ \t\n")
    if reference is not None and re.fullmatch(r"\(?[A-Ja-j]\)?", reference.strip()) and (letter := _last_letter(text)):
        return letter
    return (None if is_mathematics(plain(whole)) else _last_number(text)) or whole or None


def _is_one_value(text: str) -> bool:
    """Whether a short line is a choice with its text, a number with its unit, a list, a range or a date."""
    if "\n" in text or len(text) > MOST_VALUE_CHARACTERS:
        return False
    form = plain(text)
    return bool(_is_list(form) or _is_quantity(form) or _CHOICE.match(text) or _DATE.search(text))


def _is_list(form: str) -> bool:
    several = list_of(form)
    return several is not None and all(number_of(one) or choice_of(one) or list_of(one) for one in several.entries)


def _is_quantity(form: str) -> bool:
    has_unit = number_of(form) and re.search(r"[A-Za-z%$€£]", form)
    return bool(has_unit or range_of(form) or _QUANTITY.fullmatch(form))


def _last_boxed(text: str) -> str | None:
    found = last_box(text)
    return None if found is None else found.content.strip()


def _last_tag(text: str) -> str | None:
    match = _last_match(_TAG, text)
    return None if match is None else match[1].strip()


def _marked(text: str) -> str | None:
    """The last box, or the last tag where that stands behind it; a box inside the tag is what the tag says."""
    box, tag = last_box(text), _last_match(_TAG, text)
    if tag is not None and (box is None or box.start < tag.start()):
        inner = tag[1].strip()
        return _after_phrase(inner) or inner
    return None if box is None else _after_phrase(box.content) or box.content.strip()


def _after_hashes(text: str) -> str | None:
    _, found, rest = text.rpartition("####")
    line = _first_line(rest).strip("*_` ") if found else ""
    # A heading of Markdown, not GSM8K's mark.
    goes_on = "\n" in rest.strip() and not re.search(r"\d", line)
    is_heading = bool(_HEADING.match(line)) or (goes_on and bool(_WORD.search(line)))
    return line if line and not is_heading else None


def _after_phrase(text: str) -> str | None:
    """What the last phrase that commits itself says; phrases without a value behind them are passed over."""
    matches = [*_PHRASE.finditer(text), *_HEADING.finditer(text)]
    denied = None
    for match in sorted(deque(matches, maxlen=200), key=lambda match: -match.end()):
        value = _sentence(text[match.end() : match.end() + 400])
        if re.search(r"n['’]t[ \t:]*$|\bnot[ \t:]*$", match[0], re.IGNORECASE):
            denied = denied or f"not {value}"
        elif value and not _IS_NO_VALUE.match(value) and not (match.re is _PHRASE and match["before"]):
            return value
    return denied


def _sentence(text: str) -> str:
    """The first sentence of a text, without the marks around it and what is said in passing."""
    line = _first_line(text.lstrip("*_}: \t\n")).strip()
    for end in _SENTENCE_END.finditer(line):
        before, rest = line[: end.start()], line[end.end() :].strip(" *_`")
        if not _goes_on(before, rest):
            line = before
            break
    aside = _ASIDE.search(line)
    line = line[: aside.start()] if aside and aside.start() else line
    return _unmarked(line)


def _goes_on(before: str, rest: str) -> bool:
    """Whether a full stop ends no sentence: within an abbreviation or a formula, or behind the letter of a choice."""
    if _ABBREVIATED.search(before) or before.count("$") % 2 or before.count("(") > before.count(")"):
        return True
    is_choice = _CHOICE.fullmatch(before.strip("*_` ")) is not None
    return is_choice and 0 < len(rest.split()) < 5 and not rest.endswith(("!", "?"))


def _unmarked(text: str) -> str:
    text = text.strip().strip("*_` ").rstrip(".;,!。").strip("*_` ").strip()
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2 else text


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0].strip()


def _last_number(text: str) -> str | None:
    """The last number; `12 or 13` where it is one of two."""
    match = _last_match(_NUMBER, text)
    if match is None:
        return None
    other = re.search(r"([0-9][0-9.,/]*)[ (,]{1,3}or $", text[max(0, match.start() - 40) : match.start()])
    return match[0] if other is None else f"{other[1]} or {match[0]}"


def _last_letter(text: str) -> str | None:
    """The last letter that is called right, else the last one in brackets or behind which a sentence ends."""
    match = _last_match(_CALLED_RIGHT, text) or _last_match(_LETTER, text)
    return None if match is None else match[1] or match[2]


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


_FINDERS: dict[str, Callable[[str], str | None]] = {
    "boxed": _last_boxed,
    "tag": _last_tag,
    "marked": _marked,
    "hashes": _after_hashes,
    "phrase": _after_phrase,
    "number": _last_number,
    "letter": _last_letter,
    "exact": str.strip,
}
