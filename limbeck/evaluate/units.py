"""Units of measure and their spellings, as far as answers are told apart by them."""

from __future__ import annotations

import re


def unit_of(text: str) -> str:
    """A unit in one spelling: lower case, singular where that is plain, squares and cubes as ^2 and ^3."""
    unit = " ".join(text.lower().replace("{", "").replace("}", "").split()).rstrip(".")
    unit = unit.replace("²", "^2").replace("³", "^3")
    unit = re.sub(r"^square (.+)", r"\1^2", re.sub(r"^cubic (.+)", r"\1^3", unit))
    unit = re.sub(r"^sq\.? ", "square ", unit)
    base, power, exponent = unit.partition("^")
    return (
        UNITS.get(base, base[:-1] if len(base) > 3 and base.endswith("s") and not base.endswith("ss") else base)
        + power
        + exponent
    )


UNITS = {
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), "m"),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), "cm"),
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), "mm"),
    **dict.fromkeys(("km", "kilometer", "kilometers", "kilometre", "kilometres"), "km"),
    **dict.fromkeys(("in", "inch", "inches"), "inch"),
    **dict.fromkeys(("ft", "foot", "feet"), "foot"),
    **dict.fromkeys(("g", "gram", "grams", "gm"), "g"),
    **dict.fromkeys(("kg", "kilogram", "kilograms", "kgs"), "kg"),
    **dict.fromkeys(("lb", "lbs", "pound", "pounds"), "pound"),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "second"),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), "minute"),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), "hour"),
    **dict.fromkeys(("day", "days"), "day"),
    **dict.fromkeys(("l", "liter", "liters", "litre", "litres"), "l"),
    **dict.fromkeys(("ml", "milliliter", "milliliters", "millilitres"), "ml"),
    **dict.fromkeys(("$", "dollar", "dollars", "usd"), "$"),
    **dict.fromkeys(("€", "euro", "euros", "eur"), "€"),
    **dict.fromkeys(("£", "gbp"), "£"),
    **dict.fromkeys(("cent", "cents"), "cent"),
    **dict.fromkeys(("%", "percent", "per cent"), "%"),
    **dict.fromkeys(("degree", "degrees", "deg"), "degree"),
    **dict.fromkeys(("rad", "radian", "radians"), "rad"),
    **dict.fromkeys(("people", "persons"), "person"),
}
"""Spellings of units: those named here are told apart; of others, such as things counted, nothing is known."""
NAMED_UNITS = frozenset(UNITS.values())


def is_unit(unit: str) -> bool:
    """Whether a unit is one that is told apart from others."""
    return unit.partition("^")[0] in NAMED_UNITS
