r"""Answers in plain forms: what is written around them is taken off, and numbers, units, choices and lists are read.

Pure functions over short texts (at most MOST_CHARACTERS); anything else has no form but its text.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from limbeck.evaluate.units import is_unit, unit_of

MOST_CHARACTERS = 1000
"""Longer answers are compared as text."""

_COMMANDS = (
    (r",\\!\s*(?=\d{3})", ","),
    (r"\\(?:left|right|displaystyle|limits|bigl?|bigr?)(?![A-Za-z])", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|textrm|mbox|operatorname|boldsymbol)\s?\{([^{}]*)\}", r" \1 "),
    (r"\\(?:boxed|fbox)\s?\{([^{}]*)\}", r"\1"),
    (r"\{,\}|\\,(?=\d{3})|(?<=\d)[\u00a0\u202f\u2009](?=\d{3})", ","),
    (r"\\[,;:! ]|~|\\quad|\\qquad|\u00a0|\u202f", " "),
    (r"\^\s?\{?\\circ\}?|\\degree|\u00b0", " degrees "),
    (r"\\(?=[$%&#€£])", ""),
    (r"\\(?:cdot|times)(?![A-Za-z])|\u00d7|\u22c5|\u00b7", "*"),
    (r"\\(?:le|leq)(?![A-Za-z])|\u2264", "<="),
    (r"\\(?:ge|geq)(?![A-Za-z])|\u2265", ">="),
    (r"\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])", "\u2248"),
    (r"\\pm(?![A-Za-z])|\u00b1", "+-"),
    (r"\\pi(?![A-Za-z])|\u03c0", "pi"),
    (r"\\infty(?![A-Za-z])|\u221e|\binfinity\b", "inf"),
    (r"[\u2212\u2013\u2014]", "-"),
    (r"[\u2018\u2019\u201c\u201d]", "'"),
)
_LATEX = [(re.compile(pattern), by) for pattern, by in _COMMANDS]
_PLAIN = r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?(?P<currency>[$€£¥]?)\s?(?P<sign2>[-+]?)(?:"
    rf"\\frac\s?\{{?(?P<top>-?[0-9]+)\}}?\s?\{{?(?P<bottom>[0-9]+)\}}?"
    rf"|(?P<whole>[0-9]+)(?:\s+|\s*\\frac\s?)\{{?(?P<n>[0-9]+)(?:\}}\{{|/)(?P<d>[0-9]+)\}}?"
    rf"|(?P<a>{_PLAIN})(?:\s?/\s?(?P<b>[0-9]+))?(?:\s?(?:\*\s?10\s?\^\s?\{{?|[eE])(?P<power>[-+]?[0-9]{{1,3}})\}}?)?)"
    rf"\.?\s?(?P<unit>%|[$€£¥]|[A-Za-z'µ][^0-9=<>{{}}\\()\[\],;+*]*(?:\^\{{?[23]\}}?|[²³])?)?"
)
_COUNTED = "zero one two three four five six seven eight nine ten eleven twelve"
_WORDS = {word: number for number, word in enumerate(_COUNTED.split(" "))} | {"twenty": 20, "hundred": 100}
SIZES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?\(?([A-J])\)?(?:[).:\]]+\s*(?P<text>.*)|\s+(?P<bare>(?-i:[A-Z0-9$\\]).*)|)",
    re.IGNORECASE,
)
_RANGE = re.compile(
    r"(?:between|from)\s+(.+?)\s+(?:and|to)\s+(.+)|(.+?)\s+to\s+(.+)|(\d[\d.,]*)\s?-\s?(\d[\d.,]*\D*)", re.IGNORECASE
)
_ABOUT = re.compile(r"^(?:about|approximately|around|roughly|exactly|only|a total of|rs\.?|usd|~)\s*", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{2,4}")
_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::\d{2})?\s?([ap]\.?m\.?)?", re.IGNORECASE)
_SPLIT = re.compile(r"\s*(?:,|;)\s*(?:and\s+|or\s+)?|\s+(?:and|or)\s+", re.IGNORECASE)
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


class Quantity(NamedTuple):
    """A numeral and what stands behind it."""

    value: Fraction
    unit: str
    """In lower case, singular where that is plain; "%" or a currency sign too; "" without one."""


class Listed(NamedTuple):
    """Several answers."""

    entries: tuple[str, ...]
    brackets: str
    """"()", "[)", "{}" and so on; "" without."""


def plain(text: str) -> str:
    r"""The text without Markdown, dollars, `\text`, spaces of LaTeX and a full stop at its end."""
    text = unicodedata.normalize("NFC", text)
    if len(text) > MOST_CHARACTERS:
        return " ".join(text.split())
    for pattern, by in _LATEX:
        text = pattern.sub(by, text)
    text = text.strip().removeprefix("\\(").removesuffix("\\)").removeprefix("\\[").removesuffix("\\]")
    text = re.sub(r"\*\*|__|`", "", text)
    if text.count("$") > 1 or re.search(r"\$[^$0-9]*$", text):
        text = text.replace("$", "")
    text = re.sub(r"\\[{}]", lambda match: match[0][1], text.strip(" '\""))
    text = re.sub(r" \^", "^", " ".join(text.split())).rstrip(".;")
    return re.sub(r"(?<=[A-Za-z])!+$", "", text).strip(" '\"")


def number_of(text: str) -> Quantity | None:
    """The number that the whole text is, with its unit; None for anything else. Of a chain of equalities, the last."""
    if len(text) > MOST_CHARACTERS or _DATE.search(text):
        return None
    text = _last_side(text)
    if text.lower() in _WORDS:
        return Quantity(Fraction(_WORDS[text.lower()]), "")
    match = _NUMBER.fullmatch(text)
    return None if match is None else _with_unit(match)


def _with_unit(match: re.Match[str]) -> Quantity | None:
    value, unit = _value(match), match["unit"] or ""
    is_factor = unit and not _is_plain_unit(unit, match.string[match.start("unit") - 1] == " ")
    if value is None or is_factor:
        return None
    size, _, counted = unit.partition(" ")
    if size.lower() in SIZES:
        value, unit = value * SIZES[size.lower()], counted
    return Quantity(-value if "-" in (match["sign"], match["sign2"]) else value, unit_of(match["currency"] or unit))


def _last_side(text: str) -> str:
    """What a chain of equalities ends with, without brackets, `about` and the letters of an ordinal."""
    text = text.rpartition("\u2248")[2].strip()
    text = text.rpartition("=")[2].strip() if "=" in text and not re.search(r"[<>]", text) else text
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    return _ABOUT.sub("", re.sub(r"(?<=[0-9])(?:st|nd|rd|th)$", "", text))


def _is_plain_unit(unit: str, is_apart: bool) -> bool:
    """Whether letters behind a numeral are a unit or what is counted, not a factor as in `3x` or `2 pi`."""
    words = unit.lower().split()
    if is_apart and len(unit) == 1 and unit.isupper():
        return True  # Newton, joule, volt and others; variables are small letters.
    if not words or is_unit(unit_of(unit)):
        return True
    return is_apart and len(words) <= 5 and len(unit) <= 60 and len(words[0]) > 1 and words[0] not in _FUNCTIONS


def choice_of(text: str) -> tuple[str, str] | None:
    """The letter (A to J) of a choice and the text behind it; None for anything else."""
    match = _CHOICE.fullmatch(text.strip())
    if match is None:
        return None
    behind = (match["text"] or match["bare"] or "").strip()
    if match["bare"] is not None and match[1] in "AIai":
        return None
    return match[1].upper(), behind


def list_of(text: str) -> Listed | None:
    """The entries of a list, set, tuple or interval; None for one answer. `+-2` is two of them."""
    inner, brackets = _unbracketed(text)
    if re.fullmatch(rf"-?(?:{_PLAIN})", inner) and not brackets:
        return None
    if inner.count("+-") == 1 and "," not in inner:
        return Listed(_both_signs(inner), "{}")
    entries = list(filter(None, _split_outside(inner)))
    if len(entries) < 2:
        return Listed((inner.strip(),), "{}") if brackets == "{}" and entries else None
    return Listed(tuple(_named(entry) for entry in entries), brackets)


def _both_signs(text: str) -> tuple[str, str]:
    before, _, behind = (part.strip() for part in text.partition("+-"))
    return f"{before}+{behind}" if before else behind, f"{before}-{behind}"


def _unbracketed(text: str) -> tuple[str, str]:
    """What stands in the brackets around a whole text, and the brackets; "" for none."""
    if len(text) > 2 and text[0] in _BRACKETS and text[-1] in ")]}" and _closes_at_end(text):
        return text[1:-1], text[0] + text[-1]
    return text, ""


def range_of(text: str) -> tuple[str, str] | None:
    """The ends of a range in words or with a dash (`3 to 5`, `between 3 and 5`, `3-5`); None for anything else."""
    match = _RANGE.fullmatch(text) if len(text) <= 200 and not _DATE.search(text) else None
    if match is None:
        return None
    low, high = [part for part in match.groups() if part is not None][:2]
    return (low.strip(), high.strip()) if number_of(low.strip()) and number_of(high.strip()) else None


def date_of(text: str) -> str | None:
    """A date in digits or a time of day, in one spelling."""
    if match := _DATE.fullmatch(text):
        return match[0]
    if match := _TIME.fullmatch(text):
        return f"{int(match[1])}:{match[2]}{(match[3] or '').lower().replace('.', '')}"
    return None


def has_several_numbers(text: str) -> bool:
    """Whether numbers of different value stand in a text that is no equation."""
    found = {Fraction(numeral.replace(",", "")) for numeral in re.findall(_PLAIN, text[:MOST_CHARACTERS])}
    return len(found) > 1


def without_unit(text: str) -> tuple[str, str]:
    """A formula and the named unit behind it; "" where there is none."""
    match = re.fullmatch(r"(.*[^\s,]) ((?:square |cubic |sq )?[A-Za-z]+(?:\^\{?[23]\}?)?)", text)
    unit = unit_of(match[2]) if match else ""
    return (match[1], unit) if match and is_unit(unit) else (text, "")


def is_mathematics(text: str) -> bool:
    """Whether a text looks like a formula, not like prose."""
    bare = re.sub(r"\\(?:begin|end)\{[a-z*]+\}|\\[A-Za-z]+", " ", text)
    words = [word for word in re.findall(r"[^\W\d_]{2,}", bare) if word not in _FUNCTIONS]
    return not words


_FUNCTIONS = {"pi", "inf", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt"}
_FUNCTIONS |= {"arcsin", "arccos", "arctan"}


def _value(match: re.Match[str]) -> Fraction | None:
    if match["top"] is not None:
        return _ratio(match["top"], match["bottom"])
    if match["whole"] is not None:
        part = _ratio(match["n"], match["d"])
        return None if part is None else int(match["whole"]) + part
    value = Fraction(match["a"].replace(",", ""))
    if match["b"] is not None:
        if int(match["b"]) == 0:
            return None
        value /= int(match["b"])
    return value * Fraction(10) ** int(match["power"]) if match["power"] else value


def _ratio(top: str, bottom: str) -> Fraction | None:
    return Fraction(int(top), int(bottom)) if int(bottom) else None


def _closes_at_end(text: str) -> bool:
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if not depth:
            return place == len(text) - 1
    return False


def _split_outside(text: str) -> list[str]:
    """The parts between commas, semicolons, `and` and `or` outside brackets; the comma of 1,234 is none."""
    parts, depth, start = [], 0, 0
    breaks = {match.start(): match.end() for match in _SPLIT.finditer(text)}
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if not depth and place >= start and place in breaks and not _is_thousands(text, place):
            parts.append(text[start:place].strip())
            start = breaks[place]
    return [*parts, text[start:].strip()]


def _is_thousands(text: str, place: int) -> bool:
    behind = re.match(r",[0-9]{3}(?![0-9])", text[place : place + 5])
    return behind is not None and re.search(r"(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})*$", text[:place]) is not None


def _named(entry: str) -> str:
    """An entry without the name in front of it (`x = 3`)."""
    match = re.fullmatch(r"[A-Za-z](?:_\{?\w\}?)?\s?=\s?(.+)", entry)
    return match[1] if match else entry
