"""What the server knows of a tokenizer's tokens: which end a text, which are never shown, what each one reads like."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from limbeck.traces.thought import KNOWN_MARKERS, THINK

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte in the vocabularies of sentencepiece."""
SPACE = "▁"
"""Stands for a space there."""
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
        self._added = {token: str(added.content) for token, added in tokenizer.added_tokens_decoder.items()}
        self.controls = tuple(
            sorted({str(added.content) for added in tokenizer.added_tokens_decoder.values() if added.special}, key=len)
        )
        """What reads as a special token where it stands in a text."""
        self._kind = _kind(tokenizer, tokens)
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
        if token in self._added:
            return self._added[token].encode()
        if self._kind == "plain":
            return self.decode([token]).encode()
        written = self._tokenizer.convert_ids_to_tokens(token) or ""
        if self._kind == "bytes":
            return bytes(_unicode_bytes()[character] for character in written)
        byte = BYTE.fullmatch(written)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        text = written.replace(SPACE, " ")
        # The space in front of a text's first word is no part of it, where the decoder takes it away.
        return text[1:].encode() if is_start and text[:1] == " " and self.decode([token])[:1] != " " else text.encode()


@functools.cache
def _unicode_bytes() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


def _kind(tokenizer: Any, tokens: dict[str, int]) -> str:
    """How tokens are written: as bytes (GPT-2's letters), pieces (sentencepiece's), or plain."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder")) if backend is not None else ""
    if '"ByteLevel"' in decoder:
        return "bytes"
    if '"ByteFallback"' in decoder or "<0x0A>" in tokens:
        return "pieces"
    return "plain"
