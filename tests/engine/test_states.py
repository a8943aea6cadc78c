"""Keys and values in pieces are those of the whole text; what cannot be computed is refused before it is begun."""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.engine.states import KeyValues, Segment, check_ids, check_segment
from limbeck.errors import ModelError

DECODER = types.SimpleNamespace(layers=2, key_heads=3, head_size=4, dtype=torch.float32, device=torch.device("cpu"))


def whole(tokens):
    return torch.randn(2, 2, 3, tokens, 4, generator=torch.Generator().manual_seed(tokens))


@given(
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    shared=st.integers(0, 3),
    span=st.tuples(st.integers(0, 60), st.integers(1, 20)),
)
@settings(max_examples=60)
def test_any_span_is_that_of_the_whole_text(cuts, shared, span):
    total, shared = sum(cuts), min(shared, len(cuts) - 1)
    keys, values = whole(total)
    states = KeyValues(DECODER, total)
    if shared:
        first = sum(cuts[:shared])
        before = KeyValues(DECODER, first)
        before.put(0, keys[:, :, :first], values[:, :, :first])
        states = KeyValues(DECODER, total - first, before)
    assert states.room == total
    start = states.start
    for length in cuts[shared:]:
        own = slice(start - states.start, start - states.start + length)
        here = slice(start, start + length)
        states.keys[:, :, own], states.values[:, :, own] = keys[:, :, here], values[:, :, here]
        start += length
    begin = span[0] % total
    end = min(total, begin + span[1])
    for found, expected in zip(states.cut(begin, end), (keys, values), strict=True):
        assert torch.equal(found, expected[:, :, begin:end])


def test_what_is_cut_is_a_copy():
    states = KeyValues(DECODER, 4)
    states.put(0, *whole(4))
    keys, _ = states.cut(1, 3)
    states.keys.zero_()
    assert keys.abs().sum() > 0


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment([]), "without tokens"),
        (Segment([1, 2], start=15), "a prompt of 17 tokens; the limit is 16"),
        (Segment([3, 99]), "token ids 3 to 99; the model has 0 to 63"),
        (Segment([-1, 5]), "token ids -1 to 5; the model has 0 to 63"),
    ],
)
def test_a_segment_that_no_model_computes_is_refused(segment, message):
    with pytest.raises(ModelError, match=message):
        check_segment(segment, max_tokens=16, embeddings=64)


@given(st.lists(st.integers(-2, 9), min_size=1))
def test_ids_are_those_of_the_model_or_refused(tokens):
    if all(0 <= token < 8 for token in tokens):
        assert check_ids(tokens, 8) is None
    else:
        with pytest.raises(ModelError, match="the model has 0 to 7"):
            check_ids(tokens, 8)
