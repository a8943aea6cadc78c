r"""The answer in a `\boxed{}`, which mathematics is written with."""

from __future__ import annotations

import re
from typing import NamedTuple


class Box(NamedTuple):
    """A box in a text."""

    start: int
    """Where its content begins, in characters."""
    content: str


def last_box(text: str) -> Box | None:
    r"""The \boxed{} (or \fbox{}) that begins last among those that are closed; one pass. None without any."""
    opened: list[int | None] = []
    found = None
    boxes = {match.end() for match in re.finditer(r"\\(?:boxed|fbox)[ \t]?\{", text)}
    for match in re.finditer(r"\\[{}\\]|[{}]", text):
        if match[0] == "{":
            opened.append(match.end() if match.end() in boxes else None)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (found is None or start > found.start):
                found = Box(start, text[start : match.start()])
    return found
