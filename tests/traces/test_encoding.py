"""Tokens and characters: a prompt's tokens are its own, whatever follows, and no character is lost or told twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import byte_tokenizer

from limbeck.errors import TemplateError
from limbeck.traces.encoding import encode, encode_parts

TOKENIZER = byte_tokenizer(merges=("t h", "th e", "Ġ the", "Ċ Ċ"))
texts = st.text("the \n\u00e9\u2603", max_size=40)


@given(texts)
@settings(max_examples=150)
def test_offsets_run_through_the_text(text):
    encoded = encode(text, TOKENIZER)
    assert (np.diff(encoded.starts) >= 0).all() and (np.diff(encoded.ends) >= 0).all()
    assert (encoded.starts <= encoded.ends).all()
    if text:
        assert encoded.ends[-1] == len(text)
        assert TOKENIZER.decode(encoded.input_ids) == text


@given(texts, texts)
@settings(max_examples=150)
def test_the_tokens_of_a_header_are_its_own(header, response):
    parts, count = encode_parts(header, response, TOKENIZER)
    assert parts.input_ids[:count].tolist() == encode(header, TOKENIZER).input_ids.tolist()
    assert TOKENIZER.decode(parts.input_ids) == header + response
    assert (parts.ends[count:] > len(header)).all()
    assert not len(parts.ends) or parts.ends[-1] == len(header + response)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(TemplateError, match="Slow has no character offsets"):
        encode("text", Slow())
