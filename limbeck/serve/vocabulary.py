"""What the server knows of a tokenizer's tokens: which end a text, which are never shown, what each one reads like."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from limbeck.models.token_bytes import TokenBytes
from limbeck.traces.thought import KNOWN_MARKERS, THINK

LONG_TOKENS = 1024
"""Texts of more are decoded without the interpreter's lock, so that other threads go on."""


class Vocabulary:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any, stated_ends: Iterable[int]) -> None:
        """`stated_ends`: end tokens that the model names beside the tokenizer's."""
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.ends = frozenset([*own, *stated_ends])
        """Tokens that end a text."""
        markers = {tokenizer.convert_tokens_to_ids(marker) for pair in KNOWN_MARKERS for marker in pair}
        self.hidden = frozenset(tokenizer.all_special_ids) - markers
        """Special tokens, which no text shows; a thought's markers are shown, since it is told by them."""
        self.open_ids, self.close_ids = (tokenizer.encode(marker, add_special_tokens=False) for marker in THINK)
        self.has_markers = len(self.open_ids) == 1
        """Whether a thought begins with a token of its own, so that this model may have been trained to think."""
        tokens = tokenizer.get_vocab()
        self.longest = max(map(len, tokens), default=1)
        """Characters of the longest token."""
        self.controls = tuple(
            sorted({str(added.content) for added in tokenizer.added_tokens_decoder.values() if added.special}, key=len)
        )
        """What reads as a special token where it stands in a text."""
        self._token_bytes = TokenBytes(tokenizer)
        self.text_of = functools.lru_cache(1 << 16)(self._text_of)
        """The text of one token."""
        self.bytes_of = functools.lru_cache(1 << 16)(self._bytes_of)
        """The bytes that a token adds to a text: bytes_of(token, whether it is the text's first)."""

    def ids_within(self, markers: Sequence[str]) -> frozenset[int]:
        """Tokens that stand in any of some markers."""
        ids = (self._tokenizer.encode(marker, add_special_tokens=False) for marker in markers)
        return frozenset(token for found in ids for token in found)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        if self._backend is not None and len(ids) > LONG_TOKENS:  # of its calls the one for batches lets the lock go
            return str(self._backend.decode_batch([list(ids)], skip_special_tokens=False)[0])
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def shown(self, ids: Sequence[int]) -> str:
        """Text of tokens without the hidden ones."""
        return self.decode([token for token in ids if token not in self.hidden])

    def _text_of(self, token: int) -> str:
        return self.decode([token])

    def _bytes_of(self, token: int, is_start: bool) -> bytes:
        data = self._token_bytes.of(token)
        # The space in front of a text's first word is no part of it, where the decoder takes it away.
        return data[1:] if is_start and data[:1] == b" " and self.decode([token])[:1] != " " else data
