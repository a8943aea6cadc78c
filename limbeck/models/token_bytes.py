"""The bytes that tokens stand for inside a text, whatever the kind of their tokenizer."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte in the vocabularies of sentencepiece."""
SPACE = "▁"
"""Stands for a space there."""


class TokenBytes:
    """Of one tokenizer: GPT-2's letters for bytes, sentencepiece's pieces, or plain words."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {token: str(added.content) for token, added in tokenizer.added_tokens_decoder.items()}
        self._kind = _kind(tokenizer)

    def of(self, token: int) -> bytes:
        """What the token writes behind other text; a special token its own name."""
        if token in self._added:
            return self._added[token].encode()
        if self._kind == "plain":
            decoded: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            return decoded.encode()
        written = self._tokenizer.convert_ids_to_tokens(token) or ""
        if self._kind == "bytes":
            return bytes(_unicode_bytes()[character] for character in written)
        byte = BYTE.fullmatch(written)
        return bytes([int(byte[1], 16)]) if byte is not None else written.replace(SPACE, " ").encode()


@functools.cache
def _unicode_bytes() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


def _kind(tokenizer: Any) -> str:
    """How tokens are written: as bytes (GPT-2's letters), pieces (sentencepiece's), or plain."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder"), ensure_ascii=False) if backend is not None else ""
    if '"ByteLevel"' in decoder:
        return "bytes"
    is_sentencepiece = '"ByteFallback"' in decoder or f'"{SPACE}"' in decoder or "<0x0A>" in tokenizer.get_vocab()
    return "pieces" if is_sentencepiece else "plain"
