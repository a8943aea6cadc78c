"""Thought and answer of a text that is still being written.

The same splitter makes the whole reply of a request that does not stream, so that both have the same words. Only the
start of the reply can open a thought: markers that an answer quotes stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from limbeck.serve.text import overlap
from limbeck.traces.thought import KNOWN_MARKERS, Markers


class Split(NamedTuple):
    """What a piece of text adds to either part."""

    thought: str = ""
    answer: str = ""


class ThoughtSplitter:
    """Blank space around the thought, and in front of the answer behind it, is dropped."""

    def __init__(self, opened: Markers | None = None, known: Sequence[Markers] = KNOWN_MARKERS) -> None:
        """`opened`: the pair that the prompt has opened already."""
        self._known = known
        self._pair = opened
        self._is_answer = False
        self._held = ""
        self._has_begun = False
        """Whether the part under way has anything but blank space."""
        self.has_thought = opened is not None

    @property
    def in_thought(self) -> bool:
        """Whether the text stands within a thought."""
        return self._pair is not None and not self._is_answer

    def add(self, text: str) -> Split:
        """Split what is certain now."""
        self._held += text
        if self._pair is None and not self._is_answer:
            self._look_for_start()
        if self._is_answer:
            return Split(answer=self._answer())
        return self._thought() if self._pair is not None else Split()

    def finish(self) -> Split:
        """What was held back, once nothing more comes."""
        if self._pair is None or self._is_answer:
            self._is_answer = True
            return Split(answer=self._answer())
        held, self._held = self._held.rstrip(), ""
        return Split(thought=held if self._has_begun else held.lstrip())

    def _look_for_start(self) -> None:
        begun = self._held.lstrip()
        for pair in self._known:
            if begun.startswith(pair.start):
                self._pair, self._held, self.has_thought = pair, begun[len(pair.start) :], True
                return
        if not any(pair.start.startswith(begun) for pair in self._known):
            self._is_answer = self._has_begun = True  # no thought; its blank space is the answer's own

    def _thought(self) -> Split:
        assert self._pair is not None
        thought, end, answer = self._held.partition(self._pair.end)
        if end:
            self._held, self._is_answer = answer, True
            begun, self._has_begun = self._has_begun, False
            return Split(thought.rstrip() if begun else thought.strip(), self._answer())
        keep = overlap(self._held, self._pair.end)
        certain = self._held[: len(self._held) - keep].rstrip()
        self._held = self._held[len(certain) :]
        if not self._has_begun:
            certain = certain.lstrip()
        self._has_begun = self._has_begun or bool(certain)
        return Split(thought=certain)

    def _answer(self) -> str:
        text, self._held = self._held, ""
        if not self._has_begun:
            text = text.lstrip()
            self._has_begun = bool(text)
        return text
