"""Log-probs of tokens in the two shapes of OpenAI's API, as JSON that is written while a text grows.

Written at once, since as objects they would take ten times the memory and, all together, seconds of the event loop.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

from limbeck.engine.jobs import Drawn
from limbeck.serve.vocabulary import Vocabulary


class LogProbsText:
    """Those of one text. Bytes are those that a token adds to it; offsets count its characters."""

    def __init__(self, vocabulary: Vocabulary, hidden: frozenset[int], follows: bool) -> None:
        """`hidden`: tokens that the text does not show; `follows`: whether it goes on from words before it."""
        self._vocabulary, self._hidden = vocabulary, hidden
        self._is_start = not follows
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self._lists: dict[str, list[str]] = {}

    def add(self, drawn: Sequence[Drawn], is_chat: bool) -> None:
        """Write the next tokens, as chats or completions have them."""
        lists = {"content": [self._entry(one) for one in drawn]} if is_chat else self._columns(drawn)
        for name, values in lists.items():
            self._lists.setdefault(name, [])
            if values:
                self._lists[name].append(json.dumps(values, ensure_ascii=False, allow_nan=False)[1:-1])

    def take(self) -> str:
        """A JSON object of all that was written since it was last taken."""
        lists, self._lists = self._lists, {name: [] for name in self._lists}
        return "{" + ",".join(f'"{name}":[{",".join(parts)}]' for name, parts in lists.items()) + "}"

    def _columns(self, drawn: Sequence[Drawn]) -> dict[str, list[Any]]:
        rows = []
        for one in drawn:
            top = None if one.log_prob is None else self._top(one, one.log_prob)
            rows.append((self._text(one.token), one.log_prob, top, self._offset))
            self._pass(one.token)
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [row[place] for row in rows] for place, name in enumerate(names)}

    def _top(self, one: Drawn, log_prob: float) -> dict[str, float]:
        """By text; the token itself is always among them. Of two tokens with the same text the likelier one stays."""
        found: dict[str, float] = {}
        for token, value in [*one.top, (one.token, log_prob)]:
            found.setdefault(self._text(token), value)
        return found

    def _entry(self, one: Drawn) -> dict[str, Any]:
        entry = {**self._of(one.token, one.log_prob), "top_logprobs": [self._of(*other) for other in one.top]}
        self._pass(one.token)
        return entry

    def _of(self, token: int, log_prob: float | None) -> dict[str, Any]:
        data = self._vocabulary.bytes_of(token, self._is_start)
        return {"token": self._text(token), "logprob": log_prob, "bytes": list(data)}

    def _text(self, token: int) -> str:
        """As OpenAI writes a token that is a part of a character: bytes:\\xf0\\x9f."""
        data = self._vocabulary.bytes_of(token, self._is_start)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _pass(self, token: int) -> None:
        if token not in self._hidden:
            self._offset += len(self._characters.decode(self._vocabulary.bytes_of(token, self._is_start)))
            self._is_start = False
