"""The record that the project is about: one reasoning trace, as text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One problem and one worked solution of it.

    The three segments are text without markers: `messages` (the prompt), `cot` and `answer`. Rendering for a tokenizer
    adds the markers and the template.
    """

    messages: tuple[Mapping[str, Any], ...]
    """The prompt: messages with `role` and `content`, the last from the user or a tool. Earlier assistant turns belong
    to it, perhaps with `reasoning_content` and `tool_calls`."""
    cot: str | None
    """Chain of thought without its markers; None when the trace has no thought at all (no markers are rendered)."""
    answer: str | None
    """What follows the thought; None when the trace ends inside the thought (`cot_closed` is False then)."""
    cot_closed: bool = True
    """False when the end marker is missing; it is then not rendered either, and neither is a turn end."""
    source: str = ""
    """Where the trace came from: file and line, or data set and row."""
    reference: str | None = None
    """The verified or official short answer, for checking; None when unknown."""
    correct: bool | None = None
    """Whether the answer was checked: True right, False wrong, None unknown."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Anything else, JSON-ready."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """The tools that the reply calls behind its answer, which may then be empty (`traces.calls`)."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Schemas of the tools that the prompt offers."""
    turn_weights: tuple[float, ...] = ()
    """What each assistant turn weighs in the loss, the reply last; empty: the reply alone, with 1."""

    @property
    def prompt_key(self) -> str:
        """Sixteen hex digits of the prompt alone: equal prompts are duplicates and stay in one split.

        Of a trace with several trained turns it is what stands before the first of them.
        """
        return _digest([dict(message) for message in self.opening])

    @property
    def opening(self) -> tuple[Mapping[str, Any], ...]:
        """The messages before the first turn that is trained."""
        places = [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]
        trained = [place for place, weight in zip(places, self.turn_weights, strict=False) if weight]
        return self.messages[: trained[0]] if trained else self.messages

    @property
    def uses_tools(self) -> bool:
        """Whether tools are offered, called or answer in it."""
        of_messages = (message["role"] == "tool" or "tool_calls" in message for message in self.messages)
        return bool(self.tools or self.tool_calls) or any(of_messages)

    @property
    def has_turns(self) -> bool:
        """Whether it is more than a prompt and a reply in words: several trained turns, weights, or tools."""
        return bool(self.turn_weights) or self.uses_tools

    @property
    def key(self) -> str:
        """Sixteen hex digits of the whole text."""
        text = [[dict(message) for message in self.messages], self.cot, self.answer, self.cot_closed]
        more = [list(part) for part in (self.tool_calls, self.tools, self.turn_weights)]
        return _digest(text + more if any(more) else text)


_TURN_FIELDS = ("tool_calls", "tools", "turn_weights")
"""Fields that only traces of several turns or with tools have."""


def to_json(trace: Trace) -> str:
    """One line of limbeck's own JSONL format, which `from_json` reads back to an equal trace."""
    tree = {f.name: getattr(trace, f.name) for f in dataclasses.fields(trace)}
    tree["messages"] = [dict(message) for message in trace.messages]
    tree["metadata"] = dict(trace.metadata)
    tree = {name: value for name, value in tree.items() if value or name not in _TURN_FIELDS}
    return json.dumps({"limbeck_trace": 1, **tree}, ensure_ascii=False)


def from_json(record: Mapping[str, Any]) -> Trace:
    """The trace in one decoded line of limbeck's own format."""
    names = {f.name for f in dataclasses.fields(Trace)}
    values = {name: value for name, value in record.items() if name in names}
    values |= {name: tuple(record[name]) for name in ("messages", *_TURN_FIELDS) if name in record}
    return Trace(**values)


def write_jsonl(traces: Iterable[Trace], path: Path) -> int:
    """Write traces to `path`, one a line, through a temporary name; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for trace in traces:
            file.write(to_json(trace) + "\n")
            count += 1
    partial.replace(path)
    return count


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
