"""What the tokens of a tokenizer spell, and which of them it begins given bytes with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from limbeck.models.load import vocabulary_size
from limbeck.models.token_bytes import TokenBytes

END = b"\xff<end>"
"""What every token spells that ends a turn; the byte 0xFF is in no text."""


class Spelling:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any, ends: Iterable[int], markers: Iterable[str]) -> None:
        """`ends`: the tokens that end a turn, the usual one first; `markers`: texts of special tokens that are read."""
        self._tokenizer = tokenizer
        self.ends = tuple(dict.fromkeys(ends))
        self.names: dict[str, int] = tokenizer.get_vocab()
        of = TokenBytes(tokenizer).of
        self.table = [b""] * vocabulary_size(tokenizer)
        """The bytes of each id; none where the tokenizer has no such id."""
        for token in self.names.values():
            self.table[token] = END if token in self.ends else of(token)
        unread = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} - {*self.ends}
        self.controls = {token for token in unread if self.table[token].decode() not in set(markers)}
        """Special tokens that stand for no text, such as those which begin a turn."""
        texts = {self.table[token]: token for token in reversed(range(len(self.table))) if token not in self.controls}
        self.by_bytes = {text: token for text, token in texts.items() if text} | {END: self.ends[0]}
        """The token that spells some bytes, the first one where several do."""
        self._longest = max(map(len, self.by_bytes))

    def spell(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence."""
        return b"".join(self.table[token] for token in ids)

    def begin(self, text: bytes) -> int | None:
        """The token that a text begins with; None where no token spells its beginning.

        That is the token of these bytes if there is one, else what the tokenizer makes of the text, else, where the
        text is part of a character or the tokenizer puts something in front, the longest token that begins it.
        """
        if text in self.by_bytes:
            return self.by_bytes[text]
        try:
            (token, *_) = self._tokenizer.encode(text.decode(), add_special_tokens=False) or [-1]
        except UnicodeDecodeError:
            token = -1
        if token >= 0 and self.table[token] and text.startswith(self.table[token]):
            return int(token)
        prefixes = (text[:length] for length in range(min(len(text), self._longest), 0, -1))
        return next((self.by_bytes[prefix] for prefix in prefixes if prefix in self.by_bytes), None)


def tokenizer_hash(tokenizer: Any) -> str:
    """Sixteen hex digits of a vocabulary; merges and templates are told apart by the sequences that they make."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
