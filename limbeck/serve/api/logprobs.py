"""Log-probs of tokens in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from limbeck.engine.jobs import Drawn
from limbeck.serve.text import HALF

TokenText = Callable[[int], str]


class CompletionLogProbs:
    """Lists over tokens; text offsets go on from piece to piece."""

    def __init__(self, text_of: TokenText) -> None:
        self._text_of, self._offset = text_of, 0

    def add(self, drawn: Sequence[Drawn]) -> dict[str, list[Any]]:
        """Of the next tokens."""
        texts = [self._text_of(one.token) for one in drawn]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.log_prob for one in drawn],
            "top_logprobs": [self._top(one) for one in drawn],
            "text_offset": offsets,
        }

    def _top(self, one: Drawn) -> dict[str, float] | None:
        """By text; the token itself is always among them. Of two tokens with the same text the likelier one stays."""
        if one.log_prob is None:
            return None
        found: dict[str, float] = {}
        for token, value in [*one.top, (one.token, one.log_prob)]:
            found.setdefault(self._text_of(token), value)
        return found


def chat_log_probs(drawn: Sequence[Drawn], text_of: TokenText) -> dict[str, list[Any]]:
    """A list of tokens, each with its alternatives."""
    content = [
        {
            **_entry(text_of(one.token), one.log_prob),
            "top_logprobs": [_entry(text_of(token), value) for token, value in one.top],
        }
        for one in drawn
    ]
    return {"content": content}


def _entry(text: str, log_prob: float | None) -> dict[str, Any]:
    """Without bytes where the token is a part of a character, since its text does not tell them."""
    return {"token": text, "logprob": log_prob, "bytes": None if HALF in text else list(text.encode())}
