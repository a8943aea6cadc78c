"""What an output derived first, and whether its answer is that: where the task tells how a derivation is written.

A score alone does not say what a gain is made of. Three rates do: `derivation_right` (the first derivation is right),
`answer_as_derived` (the answer is what was derived first) and `stop_rate`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_VALUE = r"(?P<derived>[-+]?\w+(?:[.,:/]\w+)*)"
"""A number or a word, without the full stop behind it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Derived:
    """The first derivations of the outputs of one problem, one entry a sample."""

    values: list[str | None]
    """What was derived; None where the thought holds no derivation."""
    right: list[bool]
    """Whether that equals the reference."""
    is_answer: list[bool]
    """Whether the answer equals it; False where either is missing."""


def first_derived(output: str, pattern: str, end_marker: str = "</think>") -> str | None:
    """What the thought of an output derives first; None when nothing in it fits.

    Args:
      output: what a model wrote.
      pattern: `RenderConfig.derivation_pattern`: a regular expression with {answer} where the value stands.
      end_marker: closes the thought; without it all of the output counts.
    """
    wanted = pattern.replace("{answer}", _VALUE, 1).replace("{answer}", "(?P=derived)")
    found = re.search(wanted, output.partition(end_marker)[0])
    return found["derived"] if found else None


def rates_of(derived: Sequence[Derived]) -> dict[str, list[list[bool]]]:
    """What is counted, by name, as bool [P N]."""
    return {
        "derivation_right": [one.right for one in derived],
        "answer_as_derived": [one.is_answer for one in derived],
    }
