"""How numbers are written: one unit a column or axis, chosen by its largest value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from limbeck.report.rows import Estimate

Kind = Literal["tokens", "flops", "seconds", "bytes", "number"]
MISSING = "–"
_GLUE = "\u00a0"
"""A space at which no line is broken."""
_SCALES: dict[str, list[tuple[float, str]]] = {
    "tokens": [(1e9, "G tokens"), (1e6, "M tokens"), (1e3, "k tokens"), (1, "tokens")],
    "flops": [(1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1, "FLOP")],
    "seconds": [(3600, "h"), (1, "s")],
    "bytes": [(2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1, "B")],
    "number": [(1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")],
}


class Scale(NamedTuple):
    """Divide by `divisor` and the number is in `unit`."""

    divisor: float
    unit: str

    def write(self, value: float | None) -> str:
        """Three significant digits, in this unit, without the unit's name."""
        return MISSING if value is None else digits(value / self.divisor)


def scale_of(values: Iterable[float | None], kind: Kind) -> Scale:
    """The largest unit that is at most twice the largest value away from 1; seconds stay seconds up to two hours."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    least = 2.0 if kind == "seconds" else 1.0
    scales = _SCALES[kind]
    return Scale(*next((scale for scale in scales if largest >= least * scale[0]), scales[-1]))


def quantity(value: float, kind: Kind) -> str:
    """A single number with its unit, for running text."""
    scale = scale_of([value], kind)
    return f"{scale.write(value)}{_GLUE}{scale.unit}".strip()


def digits(value: float) -> str:
    """Three significant digits without an exponent for ordinary sizes."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 else f"{value:.3g}"


def share(value: float | None, places: int = 3) -> str:
    """A fraction."""
    return MISSING if value is None else f"{value:.{places}f}"


def interval(estimate: Estimate | None, places: int = 3) -> str:
    """`0.912 (0.880–0.940)`; `(no interval)` where none was computed, so that none is taken for granted."""
    if estimate is None:
        return MISSING
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{places}f} (no interval)"
    return f"{estimate.value:.{places}f} ({estimate.low:.{places}f}–{estimate.high:.{places}f})"


def percent(value: float) -> str:
    """A share in running text, such as `49 %`."""
    return f"{100 * value:.0f}{_GLUE}%"


def percent_interval(estimate: Estimate) -> str:
    """A share with its interval in running text, such as `91 % (88–94)`."""
    if estimate.low is None or estimate.high is None:
        return f"{percent(estimate.value)} (no interval)"
    return f"{percent(estimate.value)} ({100 * estimate.low:.0f}–{100 * estimate.high:.0f})"
