"""Comparing an answer with the reference by plain rules: text, numbers with units, choices, lists and ranges.

What no rule decides is left open, for math-verify or as unknown: wrong means that a rule says so. Linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from limbeck.evaluate.answer_forms import (
    MOST_CHARACTERS,
    Listed,
    Quantity,
    choice_of,
    date_of,
    has_several_numbers,
    is_mathematics,
    list_of,
    number_of,
    plain,
    range_of,
    without_unit,
)
from limbeck.evaluate.answers import AnswerStyle, Verdict, extract_answer
from limbeck.evaluate.numbers import equal_numbers
from limbeck.evaluate.units import is_unit

MOST_WORDS_OF_A_CHOICE = 8
"""Longer texts that name several letters weigh them; shorter ones choose them."""
_FLAGS = {"yes": "yes", "no": "no", "true": "true", "false": "false"}


def check_exact(candidate: object, reference: object) -> Verdict:
    """Compare an answer with the reference by plain rules.

    Args:
      candidate: the extracted answer; None (no answer) is wrong.
      reference: the right answer, or a worked solution with a box or #### in it; None is unknown.
    Returns: unknown where no rule decides.
    """
    return compare(candidate, reference) or Verdict.UNKNOWN


def compare(candidate: object, reference: object) -> Verdict | None:
    """As `check_exact`; None where no rule decides and mathematics might."""
    right, given = _as_text(reference), _as_text(candidate)
    if right is None or not right.strip():
        return Verdict.UNKNOWN
    if candidate is None:
        return Verdict.WRONG
    if given is None:
        return Verdict.UNKNOWN
    if " ".join(given.split()) == " ".join(right.split()):
        return Verdict.RIGHT
    if max(len(given), len(right)) > MOST_CHARACTERS and not re.search(r"\\boxed|####", right):
        return Verdict.WRONG
    return _compare_plain(plain(given), plain(short(right)))


def _compare_plain(given: str, right: str) -> Verdict | None:
    given, right = (re.sub(r"^[A-Za-z] ?(?:\\in(?![A-Za-z])|\u2208) ?", "", text) for text in (given, right))
    if not given:
        return Verdict.WRONG
    if _folded(given) == _folded(right):
        return Verdict.RIGHT
    for rule in (_by_choice, _by_flag, _by_date, _by_aside, _by_number, _by_unit, _by_list, _by_relation):
        verdict = rule(given, right)
        if verdict is not None:
            return verdict
    return _by_words(given, right)


def _by_choice(given: str, right: str) -> Verdict | None:
    """A letter against a letter, a letter with its text against either."""
    theirs, (letter, text) = choice_of(right), choice_of(given) or (None, "")
    if theirs is None:
        return Verdict.RIGHT if _is_right(text, right) else None
    letters = _letters(given)
    if len(letters) > 1:
        return Verdict.WRONG if len(given.split()) <= MOST_WORDS_OF_A_CHOICE else Verdict.UNKNOWN
    if letter or letters:
        return _verdict((letter or letters[0]) == theirs[0])
    # It may be the text of the right choice, which is not always known here.
    return Verdict.RIGHT if _is_right(given, theirs[1]) else Verdict.UNKNOWN


def _is_right(given: str, right: str) -> bool:
    return bool(given and right) and _compare_plain(given, right) is Verdict.RIGHT


def _by_flag(given: str, right: str) -> Verdict | None:
    theirs = _FLAGS.get(right.lower())
    if theirs is None:
        return None
    first = re.match(r"[a-z]+", given.lower())
    ours = _FLAGS.get(first[0]) if first else None
    if ours is None or (ours in ("yes", "no")) != (theirs in ("yes", "no")):
        return Verdict.UNKNOWN
    return _verdict(ours == theirs)


def _by_date(given: str, right: str) -> Verdict | None:
    theirs, ours = date_of(right), date_of(given)
    if theirs is None and ours is None:
        return None
    if theirs is not None and ours is not None:
        return _verdict(theirs == ours)
    return Verdict.WRONG if number_of(right) or number_of(given) else Verdict.UNKNOWN


def _by_aside(given: str, right: str) -> Verdict | None:
    """`7 (seven)` and `seven (7)`: right where one of both is."""
    match = re.fullmatch(r"([^()]+) \(([^()]+)\)", given)
    if match is None or not re.search(r"[A-Za-z]{2}", given) or "(" in right:
        return None
    return Verdict.RIGHT if any(_is_right(part, right) for part in match.groups()) else None


def _by_unit(given: str, right: str) -> Verdict | None:
    """Formulas with units: the units first, then what stands in front of them."""
    (ours, our_unit), (theirs, their_unit) = without_unit(given), without_unit(right)
    if (not our_unit and not their_unit) or not is_mathematics(theirs):
        return None
    if our_unit and their_unit and our_unit != their_unit:
        return Verdict.UNKNOWN
    return _compare_plain(ours, theirs)


def _by_relation(given: str, right: str) -> Verdict | None:
    """An inequality and an interval may be the same set."""
    relations = [re.search(r"[<>]", text) is not None for text in (given, right)]
    return Verdict.UNKNOWN if relations[0] != relations[1] and re.search(r"[(\[]", given + right) else None


def _by_number(given: str, right: str) -> Verdict | None:
    theirs, ours = number_of(right), number_of(given)
    if theirs is None:
        return None
    if ours is None:
        return _by_other_than_one_number(given, theirs)
    sides = filter(None, map(number_of, given.split("\u2248")))
    is_one_side = any(equal_numbers(side, theirs) is Verdict.RIGHT for side in sides)
    return Verdict.RIGHT if is_one_side else equal_numbers(ours, theirs)


def _by_other_than_one_number(given: str, theirs: Quantity) -> Verdict | None:
    if re.fullmatch(r"-?[0-9]+,[0-9]+", given) and number_of(given.replace(",", ".")) == theirs:
        return Verdict.UNKNOWN  # A comma for a decimal point, or two numbers.
    if range_of(given) is not None:
        return Verdict.WRONG
    several = list_of(given)
    if several is None:
        return Verdict.WRONG if _is_hedged(given) and has_several_numbers(given) else None
    return _by_numbers([number_of(entry) for entry in several.entries], theirs)


def _by_numbers(numbers: Sequence[Quantity | None], theirs: Quantity) -> Verdict:
    """The entries of a list against one number."""
    if all(number is not None and equal_numbers(number, theirs) is Verdict.RIGHT for number in numbers):
        return Verdict.RIGHT  # `0.5 or 50%`.
    units = {number.unit for number in filter(None, numbers)}
    return Verdict.UNKNOWN if sum(map(is_unit, units)) > 1 else Verdict.WRONG  # `2 hours and 5 minutes` is open.


def _by_list(given: str, right: str) -> Verdict | None:
    if (ends := range_of(right)) is not None:
        found = range_of(given)
        return None if found is None else _all_equal(found, ends)
    theirs, ours = list_of(right), list_of(given)
    if theirs is None:
        return None
    if re.fullmatch("[A-J]{2,6}", given) and all(len(entry) == 1 for entry in theirs.entries):
        ours = Listed(tuple(given), "")
    if ours is None:
        return Verdict.WRONG if number_of(given) is not None and len(theirs.entries) > 1 else None
    return _equal_lists(ours, theirs)


def _by_words(given: str, right: str) -> Verdict | None:
    """Prose: equal words are right, no common word is wrong, anything between is open."""
    if _is_row(given) and _is_row(right):
        return Verdict.WRONG
    if is_mathematics(given) and is_mathematics(right):
        return None
    if is_mathematics(right) and re.search(r"[\\^0-9]", right):
        return Verdict.UNKNOWN
    ours, theirs = _words(given), _words(right)
    if ours == theirs:
        return Verdict.RIGHT
    return Verdict.UNKNOWN if set(ours) & set(theirs) else Verdict.WRONG


def _equal_lists(ours: Listed, theirs: Listed) -> Verdict | None:
    is_ordered = ours.brackets not in ("", "{}") and theirs.brackets not in ("", "{}")
    if (is_ordered and ours.brackets != theirs.brackets) or len(ours.entries) != len(theirs.entries):
        return Verdict.WRONG
    if is_ordered or theirs.brackets in ("()", "[]", "[)", "(]"):
        return _all_equal(ours.entries, theirs.entries)
    return _equal_sets(ours.entries, theirs.entries)


def _equal_sets(ours: Sequence[str], theirs: Sequence[str]) -> Verdict | None:
    """As many entries in any order: each takes its equal."""
    left = list(ours)
    for entry in theirs:
        found = next((other for other in left if _is_right(other, entry)), None)
        if found is None:
            open_ones = any(_compare_plain(other, entry) in (None, Verdict.UNKNOWN) for other in left)
            return None if open_ones else Verdict.WRONG
        left.remove(found)
    return Verdict.RIGHT


def _all_equal(ours: Sequence[str], theirs: Sequence[str]) -> Verdict | None:
    """As many entries, one by one."""
    verdicts = [_compare_plain(a, b) for a, b in zip(ours, theirs, strict=True)]
    if Verdict.WRONG in verdicts:
        return Verdict.WRONG
    if None in verdicts:
        return None
    return Verdict.UNKNOWN if Verdict.UNKNOWN in verdicts else Verdict.RIGHT


def _letters(text: str) -> list[str]:
    """The letters of choices in a text: in brackets, or alone between blanks and commas."""
    found = re.findall(r"\(([A-J])\)|(?<![\w'’\\])([B-HJ]|A(?=\s*(?:$|[,;.:)/&]|and\b|or\b)))(?![\w'’])", text)
    return list(dict.fromkeys(first or second for first, second in found))


def _is_hedged(text: str) -> bool:
    return bool(re.search(r"\b(?:or|between|either|maybe|possibly|and|to)\b|,", text))


def _words(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+", text.lower())
    return [word for word in words if word not in ("the", "a", "an")] or words


def _folded(text: str) -> str:
    """Case is no matter in words and in a letter by itself; blanks are none in formulas."""
    return text.lower() if not is_mathematics(text) or len(text) == 1 else text.replace(" ", "")


def short(reference: str) -> str:
    """The answer in a reference that is a worked solution; any other reference as it is."""
    styles: dict[str, AnswerStyle] = {"\\boxed": "boxed", "####": "hashes"}
    found = [extract_answer(reference, style) for mark, style in styles.items() if mark in reference]
    return next((answer for answer in found if answer), reference)


def _is_row(text: str) -> bool:
    """Whether a text is numbers or letters in a row, such as a sequence; no two are equal but as texts."""
    return re.fullmatch(r"-?(?:[A-Za-z]|\d+)(?: -?(?:[A-Za-z]|\d+))+", text) is not None


def _as_text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | Fraction) and not (isinstance(value, int) and value.bit_length() > 8192):
        return str(value)
    return None


def _verdict(is_right: bool) -> Verdict:
    return Verdict.RIGHT if is_right else Verdict.WRONG
