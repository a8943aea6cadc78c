"""Text that a chat template has been over already: back to turns, so that it is not templated twice.

A text is templated when it begins (behind a begin token) with a header of one of the families below. Ends of turn at
the end of a reply are taken off too; what stands inside a text stays, since it may be quoted.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

UNTEMPLATED = "text that was templated already is taken apart into turns"
END_TAKEN_OFF = "an end-of-turn token at the end of a reply is taken off (the template writes one)"

BEGINS = ("<|begin_of_text|>", "<bos>", "<s>", "<｜begin▁of▁sentence｜>", "<|endoftext|>", "<|startoftext|>")
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<turn|>",
    "<eos>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "<|end|>",
    "<|return|>",
    "<|eom_id|>",
)


class Family(NamedTuple):
    """How a template writes turns."""

    header: re.Pattern[str]
    """Of a turn, with the role in the group `role`."""
    ends: tuple[str, ...]
    """What may close a turn."""


FAMILIES = (
    Family(re.compile(r"<\|im_start\|>(?P<role>\w+)\n"), ("<|im_end|>",)),
    Family(re.compile(r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>\n\n"), ("<|eot_id|>", "<|eom_id|>")),
    Family(re.compile(r"<start_of_turn>(?P<role>\w+)\n"), ("<end_of_turn>",)),
    Family(re.compile(r"<｜(?P<role>User|Assistant)｜>"), ("<｜end▁of▁sentence｜>",)),
    Family(re.compile(r"<\|(?P<role>system|user|assistant)\|>\n?"), ("<|end|>", "</s>", "<|endoftext|>")),
    Family(re.compile(r"\[(?P<role>INST|/INST)\]"), ("</s>",)),
)
_ROLES = {"INST": "user", "/INST": "assistant"}


def untemplated(text: str) -> list[dict[str, Any]] | None:
    """The turns of a templated text, its generation prompt as a last turn of the assistant's; None for other text."""
    text = _without_begin(text)
    for family in FAMILIES:
        if family.header.match(text):
            return _turns(text, family)
    return None


def untemplated_pair(prompt: Any, completion: Any) -> list[dict[str, Any]] | None:
    """The turns of a templated prompt with the completion behind its generation prompt; None for others."""
    if not isinstance(prompt, str) or not isinstance(completion, str):
        return None
    turns = untemplated(prompt)
    if turns is None:
        return None
    if turns[-1]["role"].lower() not in ("assistant", "model"):
        own = untemplated(completion)
        return [*turns, *(own or [{"role": "assistant", "content": completion}])]
    begun = turns.pop()["content"]
    # The completion goes on where the generation prompt stops, often inside a thought that it has opened.
    return [*turns, {"role": "assistant", "content": begun + completion}]


def without_end(reply: str) -> str:
    """The reply without ends of turn behind its last word."""
    while True:
        text = reply.rstrip()
        end = next((end for end in ENDS if text.endswith(end)), None)
        if end is None:
            return reply
        reply = text[: -len(end)]


def _without_begin(text: str) -> str:
    text = text.lstrip()
    begin = next((begin for begin in BEGINS if text.startswith(begin)), "")
    return text[len(begin) :].lstrip() if begin else text


def _turns(text: str, family: Family) -> list[dict[str, Any]]:
    headers = list(family.header.finditer(text))
    turns = []
    for header, following in zip(headers, [*headers[1:], None], strict=True):
        role = header["role"]
        content = text[header.end() : following.start() if following else len(text)]
        closed = content.rstrip()
        end = next((end for end in family.ends if closed.endswith(end)), None)
        content = closed[: -len(end)] if end else content
        turns.append(
            {"role": _ROLES.get(role, role.lower()), "content": content.strip() if role in _ROLES else content}
        )
    return turns
