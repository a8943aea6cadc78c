"""Numbers with units: equal or not."""

from __future__ import annotations

from limbeck.evaluate.answer_forms import Number
from limbeck.evaluate.answers import Verdict
from limbeck.evaluate.units import is_unit

_SCALES = {
    ("km", "m"): 1000,
    ("m", "cm"): 100,
    ("m", "mm"): 1000,
    ("cm", "mm"): 10,
    ("km", "cm"): 100_000,
    ("foot", "inch"): 12,
    ("hour", "minute"): 60,
    ("minute", "second"): 60,
    ("hour", "second"): 3600,
    ("day", "hour"): 24,
    ("kg", "g"): 1000,
    ("l", "ml"): 1000,
    ("$", "cent"): 100,
}
"""Larger unit and smaller: how many of the smaller it has."""


def equal_numbers(ours: Number, theirs: Number) -> Verdict:
    """Whether two numbers are one, in whatever units; unknown where nothing is known of the units.

    A number without a unit is of any; a share is equal to its percentage.
    """
    if ours.unit == theirs.unit or not ours.unit or not theirs.unit:
        if ours.value == theirs.value:
            return Verdict.RIGHT
        shares = (ours, theirs) if ours.unit == "%" else (theirs, ours)
        is_share = shares[0].unit == "%" and not shares[1].unit and shares[0].value / 100 == shares[1].value
        return _verdict(is_share)
    for (large, small), factor in _SCALES.items():
        for one, other in ((ours, theirs), (theirs, ours)):
            if (one.unit, other.unit) == (large, small):
                return _verdict(one.value * factor == other.value)
    if ours.value != theirs.value or (is_unit(ours.unit) and is_unit(theirs.unit)):
        return Verdict.WRONG
    return Verdict.UNKNOWN


def _verdict(is_right: bool) -> Verdict:
    return Verdict.RIGHT if is_right else Verdict.WRONG
