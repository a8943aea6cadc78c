"""What the tokens of a tokenizer spell, and which of them it begins given bytes with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from limbeck.models.load import vocabulary_size
from limbeck.models.token_bytes import BYTE, TokenBytes

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
        # Where several spell the same the first one counts, and one for a single byte last.
        ordered = sorted(self.names.items(), key=lambda item: (BYTE.fullmatch(item[0]) is None, -item[1]))
        texts = {self.table[token]: token for _, token in ordered if token not in self.controls}
        self.by_bytes = {text: token for text, token in texts.items() if text} | {END: self.ends[0]}
        """The token that spells some bytes."""
        self._longest = max(map(len, self.by_bytes))
        alone = self.spell(tokenizer.encode("a", add_special_tokens=False))
        self._before = "\n" if alone.startswith(b" ") else ""
        """What a text has to stand behind, so that the tokenizer puts no space in front of it."""

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
        token = self._written_first(text)
        if token is not None and self.table[token] and text.startswith(self.table[token]):
            return token
        prefixes = (text[:length] for length in range(min(len(text), self._longest), 0, -1))
        return next((self.by_bytes[prefix] for prefix in prefixes if prefix in self.by_bytes), None)

    def _written_first(self, text: bytes) -> int | None:
        """The first token that the tokenizer makes of a text."""
        try:
            ids: list[int] = self._tokenizer.encode(self._before + text.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            return None
        skipped = [place for place, token in enumerate(ids[:3]) if self.table[token].endswith(b"\n")] or [2]
        return next(iter(ids[skipped[0] + 1 :] if self._before else ids), None)


def tokenizer_hash(tokenizer: Any) -> str:
    """Sixteen hex digits of a vocabulary; merges and templates are told apart by the sequences that they make."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
