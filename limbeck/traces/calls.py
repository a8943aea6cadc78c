"""Calls of tools in chat turns, and the tools that a chat may use, in the form that chat templates read.

{"type": "function", "id": "...", "function": {"name": "f", "arguments": {"x": 1}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.errors import TraceFormatError
from limbeck.traces.containers import decode
from limbeck.traces.content import as_list, present

TOOL_COLUMNS = ("tools", "functions")
"""Columns that hold the schemas of the tools."""


def calls_in(turn: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The calls of an assistant's turn, under `tool_calls` or the older `function_call`; none where it has none.

    Raises: TraceFormatError for what is no call.
    """
    found = as_list(turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else []))
    if not isinstance(found, list | tuple):
        raise TraceFormatError(f"tool calls are not a list: found {type(found).__name__}")
    return tuple(map(_call, found))


def calls_as_text(text: str) -> tuple[dict[str, Any], ...]:
    """The calls that a turn of its own holds as JSON, as ShareGPT's `function_call` does.

    Raises: TraceFormatError for any other text.
    """
    found = _json(text, "a turn that calls a tool")
    return tuple(map(_call, found if isinstance(found, list) else [found]))


def tools_in(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools beside a chat; none where there are none.

    Raises: TraceFormatError where a column of that name holds something else.
    """
    name = next((column for column in TOOL_COLUMNS if record.get(column)), None)
    if name is None:
        return ()
    found = as_list(record[name])
    if not isinstance(found, list | tuple) or not all(isinstance(tool, Mapping) for tool in found):
        raise TraceFormatError(f"{name} is not a list of objects")
    tools = [
        tool if isinstance(tool.get("function"), Mapping) else {"type": "function", "function": tool} for tool in found
    ]
    if not all(isinstance(tool["function"].get("name"), str) for tool in tools):
        raise TraceFormatError(f"{name}: a tool has no name")
    return tuple(tools)


def _call(call: Any) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise TraceFormatError(f"tool call without a name: found {str(call)[:40]!r}")
    arguments: Any = next((inner[key] for key in ("arguments", "parameters") if inner.get(key) is not None), {})
    if isinstance(arguments, str):
        arguments = _json(arguments, f"the arguments of {inner['name']}") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise TraceFormatError(f"tool call: the arguments of {inner['name']} are no object")
    known = present(call)
    identity = {"id": str(known["id"])} if "id" in known else {}
    return {"type": "function", **identity, "function": {"name": inner["name"], "arguments": dict(arguments)}}


def _json(text: str, what: str) -> Any:
    try:
        return decode(text)
    except ValueError as error:
        raise TraceFormatError(f"tool call: {what} is not JSON: {text[:40]!r}") from error
