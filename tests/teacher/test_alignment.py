"""Tokens of the same bytes lie beside one another, byte by byte."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from limbeck.teacher.alignment import align, num_shared_bytes


@st.composite
def two_splits(draw):
    """Lengths of the tokens of two sequences that spell as many bytes, some tokens without any."""
    total = draw(st.integers(1, 30))

    def split():
        bounds = sorted(draw(st.lists(st.integers(0, total), max_size=12)))
        return np.diff([0, *bounds, total])

    return split(), split(), draw(st.integers(0, total))


@given(two_splits())
def test_every_byte_of_a_token_lies_in_its_span(splits):
    lengths, others, num_bytes = splits
    owner = np.repeat(np.arange(len(others)), others)
    first, last, skipped = align(lengths, others, num_bytes)
    start = 0
    for token, length in enumerate(lengths):
        if length == 0 or start + length > num_bytes:
            assert first[token] == last[token] == skipped[token] == -1
        else:
            assert (first[token], last[token]) == (owner[start], owner[start + length - 1])
            assert skipped[token] == start - others[: first[token]].sum()
        start += length


def test_equal_tokens_lie_beside_themselves():
    lengths = np.array([3, 1, 2])
    first, last, skipped = align(lengths, lengths, 6)
    assert first.tolist() == last.tolist() == [0, 1, 2]
    assert skipped.tolist() == [0, 0, 0]


@given(st.binary(max_size=9), st.binary(max_size=9), st.binary(max_size=9))
def test_shared_bytes_are_the_common_beginning(begin, one, other):
    count = num_shared_bytes(begin + one, begin + other)
    assert count >= len(begin)
    assert (begin + one)[:count] == (begin + other)[:count]
    assert (begin + one)[count : count + 1] != (begin + other)[count : count + 1] or (
        count in (len(begin + one), len(begin + other))
    )
