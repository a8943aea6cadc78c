"""Tools: which template has a place for them, and calls in a reply that is still being written.

Hermes, Qwen3   <tool_call>{"name": "f", "arguments": {...}}</tool_call>
Qwen3-Coder     <tool_call><function=f><parameter=x>...</parameter></function></tool_call>
Llama 3         {"name": "f", "parameters": {...}}, alone in the reply, or behind <|python_tag|>
harmony         <|channel|>commentary to=functions.f ...<|message|>{...}<|call|>
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from limbeck.serve.errors import Invalid
from limbeck.serve.text import overlap

FUNCTION = re.compile(r"<function=([^<>\s]++)>(.*?)(?:</function>|\Z)", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^<>\s]++)>\n?(.*?)\n?(?:</parameter>|\Z)", re.DOTALL)
HARMONY = re.compile(
    r"<\|channel\|>\w++ to=(?:functions\.)?([\w.-]++)[^<]*+(?:<\|constrain\|>\w*+)?<\|message\|>(.*)", re.DOTALL
)


class Call(NamedTuple):
    """A tool that the reply calls."""

    name: str
    arguments: str
    """JSON."""


class ToolForm(NamedTuple):
    """How a family of models writes a call."""

    starts: tuple[str, ...]
    """What a call begins with."""
    ends: tuple[str, ...]
    """What it ends with; the reply's end does as well."""
    only_at_start: bool = False
    """Whether a call is the whole reply, and begins where the reply does."""

    def calls(self, text: str) -> list[Call]:
        """Of what stands between start and end. Raises: ValueError for what is none."""
        if self is HARMONY_FORM:
            match = HARMONY.match(text)
            if match is None:
                raise ValueError(text)
            return [Call(match[1], json.dumps(json.loads(match[2]), ensure_ascii=False))]
        functions = FUNCTION.findall(text)
        if functions:
            return [Call(name, _parameters(body)) for name, body in functions]
        return [_call(one) for one in _objects(text)]


HERMES_FORM = ToolForm(("<tool_call>",), ("</tool_call>",))
LLAMA_FORM = ToolForm(("<|python_tag|>", "{"), (), only_at_start=True)
HARMONY_FORM = ToolForm(("<|channel|>commentary to=", "<|channel|>analysis to="), ("<|call|>",))


def form_of(template: str) -> ToolForm | None:
    """How models with this chat template call tools; None where it has no place for them."""
    if "tools" not in template:
        return None
    if "<|channel|>" in template:
        return HARMONY_FORM
    if "<tool_call>" in template:
        return HERMES_FORM
    return LLAMA_FORM if "parameters" in template or "<|python_tag|>" in template else None


def tool_schemas(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Tools as templates read them. Raises: Invalid for what is no function."""
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else 0
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Invalid(f"tools.{place}: give {{type: function, function: {{name, parameters}}}}.", "tools")
    return list(tools)


class ToolSplitter:
    """Parts a reply into its text and its calls while it comes; a call that cannot be read stays text."""

    def __init__(self, form: ToolForm) -> None:
        self._form = form
        self._held = ""
        self._is_call, self._has_begun = False, False
        self.count = 0
        """Calls so far."""

    def add(self, text: str) -> tuple[str, list[Call]]:
        """What is certain now: text, and calls that are whole."""
        self._held += text
        shown = ""
        calls: list[Call] = []
        while True:
            if self._is_call:
                end = min((self._held.find(end) for end in self._form.ends if end in self._held), default=-1)
                if end < 0:
                    return shown, calls
                marker = next(end_ for end_ in self._form.ends if self._held.startswith(end_, end))
                written, self._held = self._held[:end], self._held[end + len(marker) :].lstrip("\n")
                more, found = self._taken(written)
                shown, calls = shown + more, calls + found
                continue
            start = self._start()
            if start is None:
                passed = self._passed()
                return shown + passed, calls
            shown, self._held, self._is_call = shown + self._held[:start].rstrip("\n"), self._held[start:], True

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return self._taken(held) if self._is_call else (held, [])

    def _start(self) -> int | None:
        places = [self._held.find(start) for start in self._form.starts if start in self._held]
        if self._form.only_at_start:
            blank = len(self._held) - len(self._held.lstrip())
            return blank if blank in places and not self._has_begun else None
        return min(places, default=None)

    def _passed(self) -> str:
        """Text that can begin no call."""
        if self._form.only_at_start:
            begun = self._held.lstrip()
            may_be = not self._has_begun and any(start.startswith(begun) for start in self._form.starts)
            keep = len(self._held) if may_be else 0
        else:
            keep = max(overlap(self._held, start) for start in self._form.starts)
            rest = self._held[: len(self._held) - keep]
            keep += len(rest) - len(rest.rstrip("\n"))  # in front of a call they go with it
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._has_begun = self._has_begun or bool(passed.strip())
        return passed

    def _taken(self, written: str) -> tuple[str, list[Call]]:
        self._is_call, self._has_begun = False, True
        inside = written
        for start in self._form.starts:
            if start != "{":
                inside = inside.removeprefix(start) if self._form is not HARMONY_FORM else inside
        try:
            calls = self._form.calls(inside)
        except (ValueError, RecursionError):
            return written, []
        self.count += len(calls)
        return "", calls


def _objects(text: str) -> list[Any]:
    """JSON objects behind one another, blank space or a semicolon between them."""
    found, decoder, place = [], json.JSONDecoder(), 0
    while place < len(text):
        if text[place] in " \n\t\r;,":
            place += 1
            continue
        value, place = decoder.raw_decode(text, place)
        found += value if isinstance(value, list) else [value]
    if not found:
        raise ValueError("no call")
    return found


def _call(value: Any) -> Call:
    arguments = value.get("arguments", value.get("parameters")) if isinstance(value, dict) else None
    if arguments is None or not isinstance(value.get("name"), str):
        raise ValueError("no call")
    if isinstance(arguments, str):
        json.loads(arguments)
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _parameters(body: str) -> str:
    """Arguments that were written as text: JSON where it reads so."""
    found = {}
    for name, value in PARAMETER.findall(body):
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return json.dumps(found, ensure_ascii=False)
