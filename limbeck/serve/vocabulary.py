"""What the server knows of a tokenizer's tokens: which end a text, which are never shown, what each one reads like."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from limbeck.traces.thought import KNOWN_MARKERS, THINK


class Vocabulary:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any, stated_ends: Iterable[int]) -> None:
        """`stated_ends`: end tokens that the model names beside the tokenizer's."""
        self._tokenizer = tokenizer
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.ends = frozenset([*own, *stated_ends])
        """Tokens that end a text."""
        markers = {tokenizer.convert_tokens_to_ids(marker) for pair in KNOWN_MARKERS for marker in pair}
        self.hidden = frozenset(tokenizer.all_special_ids) - markers
        """Special tokens, which no text shows; a thought's markers are shown, since it is told by them."""
        self.open_ids, self.close_ids = (tokenizer.encode(marker, add_special_tokens=False) for marker in THINK)
        self.has_markers = len(self.open_ids) == 1
        """Whether a thought begins with a token of its own, so that this model may have been trained to think."""
        self.text_of = functools.lru_cache(1 << 16)(self._text_of)
        """The text of one token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def shown(self, ids: Sequence[int]) -> str:
        """Text of tokens without the hidden ones."""
        return self.decode([token for token in ids if token not in self.hidden])

    def _text_of(self, token: int) -> str:
        return self.decode([token])
