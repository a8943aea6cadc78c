"""The picture of an advice: where there is something to learn, where derivations and traces end, what cuts keep."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, INK, MUTED, GRID = "#0072b2", "#d55e00", "#009e73", "#1d2327", "#5b656d", "#dde1e4"
"""Of Okabe and Ito, as the report has them."""
NAMES = {"common_length": "one common length", "lead": "a share of each trace"}


def draw(advice: Mapping[str, Any]) -> Figure:
    """The advice of `recommend.advise` as three panels under its sentence."""
    figure = Figure(figsize=(6.4, 8.2), layout="constrained", facecolor="white")
    first, second, third = figure.subplots(3, 1)
    figure.suptitle(_wrapped(advice["sentence"]), x=0.02, ha="left", fontsize=10.5, color=INK)
    _learning(first, advice)
    _certainty(second, advice)
    _gain(third, advice)
    for axes in (first, second, third):
        axes.grid(True, axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, labelsize=8.5, length=3)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(MUTED)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a file; the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
    return stream.getvalue()


def _learning(axes: Any, advice: Mapping[str, Any]) -> None:
    """Divergence over the response, and the first derivations behind it."""
    axes.plot(*_line(advice, "divergence"), color=BLUE, label="teacher and student differ by (nats)")
    axes.set_title("What is left to learn, and where answers are first derived", **_TITLE)
    places = advice["derivations"]["places"]
    if places:
        low, middle, high = np.percentile(places, (25, 50, 75))
        axes.axvspan(low, high, color=GREEN, alpha=0.18, linewidth=0, label="first derivations end here (half of them)")
        axes.axvline(middle, color=GREEN, linewidth=1.4)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("place in the response (0 begins the thought, 1 ends the turn)", **_LABEL)


def _certainty(axes: Any, advice: Mapping[str, Any]) -> None:
    axes.plot(*_line(advice, "student_entropy"), color=BLUE, label="student's entropy (nats)")
    axes.plot(*_line(advice, "teacher_entropy"), color=ORANGE, linestyle="--", label="teacher's entropy (nats)")
    axes.plot(*_line(advice, "overlap"), color=GREEN, linestyle=":", linewidth=2, label="same likely tokens (of 10)")
    axes.set_title("How sure both are, and whether they consider the same tokens", **_TITLE)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("place in the response", **_LABEL)


def _gain(axes: Any, advice: Mapping[str, Any]) -> None:
    """Predicted gain kept over the tokens that a cut keeps."""
    for (policy, name), colour, marker, shift in zip(NAMES.items(), (BLUE, ORANGE), "os", (-0.004, 0.004), strict=True):
        cuts = [cut for cut in advice["cuts"] if cut["policy"] == policy]
        places = [cut["lead_fraction"] + shift for cut in cuts]
        axes.plot(places, [cut["gain_kept"] for cut in cuts], color=colour, marker=marker, label=f"cut at {name}")
        axes.vlines(
            places, [cut["gain_kept_low"] for cut in cuts], [cut["gain_kept_high"] for cut in cuts],
            color=colour, linewidth=1.4, alpha=0.6,
        )  # fmt: skip
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("whole traces", (0.99, 1), (0, 3), textcoords="offset points", ha="right", fontsize=8, color=MUTED)
    found = advice["recommendation"]
    if found["cut"]:
        place = (found["lead_fraction"], found["gain_kept"])
        axes.plot(*place, "o", markersize=13, fillstyle="none", color=INK, label="recommended", linestyle="none")
    axes.set_title("Predicted share of the gain of whole traces that a cut keeps", **_TITLE)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of all tokens that is kept", **_LABEL)


def _line(advice: Mapping[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    values = np.array(advice["profile"][name], dtype=float)
    return (np.arange(len(values)) + 0.5) / len(values), values


def _wrapped(text: str, width: int = 84) -> str:
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(line.rstrip() for line in lines)


_TITLE: Mapping[str, Any] = {"loc": "left", "fontsize": 9.5, "color": INK}
_LABEL: Mapping[str, Any] = {"fontsize": 9, "color": INK}
