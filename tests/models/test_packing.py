"""Codes to words and back: the dense layout, bit by bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import ShapeError
from limbeck.models.packing import pack, unpack, words_of


def slow_pack(codes, bits):
    """The definition: a row's codes as one stream of bits, low bits first."""
    rows = []
    for row in codes.tolist():
        stream = 0
        for index, code in enumerate(row):
            stream |= (code + 2 ** (bits - 1)) << (index * bits)
        count = words_of(len(row), bits)
        rows.append(np.frombuffer(stream.to_bytes(count * 4, "little"), dtype="<i4"))
    return torch.from_numpy(np.stack(rows))


def random_codes(bits, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100, 128])
def test_words_are_those_of_the_definition_and_come_back(bits, columns):
    codes = random_codes(bits, 5, columns)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (5, words_of(columns, bits))
    assert torch.equal(words, slow_pack(codes, bits))
    assert torch.equal(unpack(words, bits, columns), codes)


@given(bits=st.integers(2, 8), rows=st.integers(1, 4), columns=st.integers(1, 130), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_any_codes_come_back(bits, rows, columns, seed):
    codes = random_codes(bits, rows, columns, seed)
    assert torch.equal(unpack(pack(codes, bits), bits, columns), codes)


def test_four_bits_put_column_8w_plus_j_into_nibble_j_of_word_w():
    codes = torch.full((1, 16), -8, dtype=torch.int8)
    codes[0, 9] = 7
    assert pack(codes, 4).tolist() == [[0, 0xF0]]


def test_eight_bits_are_the_bytes_in_order():
    codes = torch.tensor([[-128, 127, 0, -1]], dtype=torch.int8)
    assert pack(codes, 8).view(torch.uint8).tolist() == [[0, 255, 128, 127]]


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_empty_tensors_stay_empty(shape):
    codes = torch.zeros(shape, dtype=torch.int8)
    words = pack(codes, 3)
    assert words.shape == (shape[0], words_of(shape[1], 3))
    assert unpack(words, 3, shape[1]).shape == shape


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="do not fit into 4 bits"):
        pack(torch.tensor([[8]], dtype=torch.int8), 4)
    with pytest.raises(ShapeError, match=r"torch\.int8 with two dimensions"):
        pack(torch.zeros(4, 4), 4)
    with pytest.raises(ShapeError, match="bits 9"):
        pack(torch.zeros(4, 4, dtype=torch.int8), 9)
    with pytest.raises(ShapeError, match="64 codes of 4 bits take 8"):
        unpack(torch.zeros(2, 7, dtype=torch.int32), 4, 64)


def test_the_library_packs_the_same():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits in range(2, 9):
        codes = random_codes(bits, 6, 75)
        assert torch.equal(pack(codes, bits), helpers.pack_to_int32(codes, bits))
