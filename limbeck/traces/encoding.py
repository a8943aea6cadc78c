"""Text -> tokens with the characters that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from limbeck.errors import TemplateError

Tokenizer = Any
"""A fast Hugging Face tokenizer (PreTrainedTokenizerFast)."""

_SPACES = (" ", "▁", "Ġ")
"""How tokenizers write the space in front of a word."""


class Encoded(NamedTuple):
    """Tokens of a text; starts and ends are characters, never decreasing."""

    input_ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def encode_parts(header: str, response: str, tokenizer: Tokenizer) -> tuple[Encoded, int]:
    """Tokens of both, and how many are the header's; those are the header's own tokens, whatever follows."""
    head, whole = encode(header, tokenizer), encode(header + response, tokenizer)
    count = len(head.input_ids)
    if np.array_equal(whole.input_ids[:count], head.input_ids):
        return whole, count
    tail = _encode_inner(response, tokenizer)
    parts = zip(head, tail._replace(starts=tail.starts + len(header), ends=tail.ends + len(header)), strict=True)
    return Encoded(*(np.concatenate(pair) for pair in parts)), count


def encode_pieces(pieces: Sequence[str], tokenizer: Tokenizer) -> Encoded:
    """Tokens of pieces behind one another: what is given (the even ones) has its own tokens, whatever follows it.

    Args:
      pieces: a header, what is written behind it, the next header, and so on.
    """
    whole = encode("".join(pieces), tokenizer)
    alone = [encode(pieces[0], tokenizer), *(_encode_inner(piece, tokenizer) for piece in pieces[1:])]
    borders = np.cumsum([0, *map(len, pieces)])
    places = np.searchsorted(whole.ends, borders, side="right")
    slices = [whole.input_ids[low:high] for low, high in pairwise(places.tolist())]
    given = zip(slices[::2], alone[::2], strict=True)
    if set(borders[1:]) <= set(whole.ends) and all(np.array_equal(own, one.input_ids) for own, one in given):
        return whole
    moved = [(ids, starts + at, ends + at) for (ids, starts, ends), at in zip(alone, borders, strict=False)]
    return Encoded(*(np.concatenate(parts) for parts in zip(*moved, strict=True)))


def _encode_inner(text: str, tokenizer: Tokenizer) -> Encoded:
    """Tokens of a text that stands inside a longer one, without the space that some tokenizers put in front."""
    encoded = encode(text, tokenizer)
    if not len(encoded.input_ids) or text[0] in _SPACES:
        return encoded
    if tokenizer.convert_ids_to_tokens(int(encoded.input_ids[0]))[0] not in _SPACES:
        return encoded
    behind_newline = encode("\n" + text, tokenizer)
    inner = behind_newline.ends > 1
    return Encoded(behind_newline.input_ids[inner], behind_newline.starts[inner] - 1, behind_newline.ends[inner] - 1)


def encode(text: str, tokenizer: Tokenizer) -> Encoded:
    """Tokens of a text, none added.

    Raises: TemplateError when the tokenizer has no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateError(
            f"{type(tokenizer).__name__} has no character offsets; segments need a fast tokenizer (tokenizer.json)."
        )
    # Special tokens come from the template alone, as at inference; a tokenizer that adds BOS must not add a second.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    offsets = np.maximum.accumulate(offsets, axis=0)  # a token that stands for no character has the offsets (0, 0)
    return Encoded(np.array(encoded["input_ids"], dtype=np.int32), offsets[:, 0], offsets[:, 1])
