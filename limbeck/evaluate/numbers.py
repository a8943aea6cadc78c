"""Numbers with units: equal or not."""

from __future__ import annotations

from limbeck.evaluate.answer_forms import Quantity
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


def equal_numbers(ours: Quantity, theirs: Quantity) -> Verdict:
    """Whether two numbers are one, in whatever units; unknown where nothing is known of the units.

    A number without a unit is of any; a share is equal to its percentage.
    """
    if ours.unit == theirs.unit or not ours.unit or not theirs.unit:
        return _verdict(ours.value == theirs.value or _is_its_percentage(ours, theirs))
    for one, other in ((ours, theirs), (theirs, ours)):
        factor = _SCALES.get((one.unit, other.unit))
        if factor is not None:
            return _verdict(one.value * factor == other.value)
    if ours.value != theirs.value or (is_unit(ours.unit) and is_unit(theirs.unit)):
        return Verdict.WRONG
    return Verdict.UNKNOWN


def _is_its_percentage(one: Quantity, other: Quantity) -> bool:
    """Whether the one is a share and the other the same in percent, in either order."""
    percent, share = sorted((one, other), key=lambda number: number.unit != "%")
    return percent.unit == "%" and not share.unit and percent.value / 100 == share.value


def _verdict(is_right: bool) -> Verdict:
    return Verdict.RIGHT if is_right else Verdict.WRONG
