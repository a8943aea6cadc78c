"""Codes of 2 to 8 bits to 32-bit words and back, in the dense layout of compressed-tensors.

A row is one stream of bits: code i, made unsigned by adding 2^(bits-1), takes bits i * bits onwards, low bits first.
So 32 codes fill exactly `bits` words and a code may lie across two of them; the last word is filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.errors import ShapeError

_LANES = 32
"""Codes that fill a whole number of words at every width."""


def words_of(columns: int, bits: int) -> int:
    """Words that a row of codes takes: ceil(columns * bits / 32)."""
    return -(-columns * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes to words, row by row.

    Args:
      codes: int8 [O I], each in -2^(bits-1)..2^(bits-1)-1.
      bits: width of a code, 2 to 8.
    Returns: int32 [O ceil(I bits / 32)].
    Raises: ShapeError for another number of dimensions or codes that do not fit.
    """
    _check(codes, bits, torch.int8, "codes")
    rows, columns = codes.shape
    half = 1 << (bits - 1)
    if codes.numel() and not (-half <= int(codes.min()) and int(codes.max()) < half):
        raise ShapeError(f"pack: codes {int(codes.min())} to {int(codes.max())} do not fit into {bits} bits.")
    # Filled up with the code whose unsigned value is 0, so that the spare bits are 0.
    padded = nn.functional.pad(codes, (0, -columns % _LANES), value=-half)
    groups = padded.shape[1] // _LANES
    lanes = (padded.to(torch.int64) + half).view(rows, groups, _LANES)
    words = torch.zeros(rows, groups, bits, dtype=torch.int64, device=codes.device)
    for lane in range(_LANES):
        word, shift = divmod(lane * bits, 32)
        words[:, :, word] |= lanes[:, :, lane] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, :, word + 1] |= lanes[:, :, lane] >> (32 - shift)
    # To the signed number with the same 32 bits.
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).view(rows, groups * bits)[:, : words_of(columns, bits)].contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Words to codes, the inverse of `pack`.

    Args:
      words: int32 [O ceil(columns bits / 32)].
      bits: width of a code, 2 to 8.
      columns: codes of a row.
    Returns: int8 [O columns].
    Raises: ShapeError when the words are not those of so many codes.
    """
    _check(words, bits, torch.int32, "words")
    rows, width = words.shape
    if width != words_of(columns, bits):
        raise ShapeError(f"unpack: {width} words a row; {columns} codes of {bits} bits take {words_of(columns, bits)}.")
    groups = -(-columns // _LANES)
    padded = nn.functional.pad(words, (0, groups * bits - width)).to(torch.int64) & 0xFFFFFFFF
    grouped = padded.view(rows, groups, bits)
    lanes = torch.empty(rows, groups, _LANES, dtype=torch.int8, device=words.device)
    half, mask = 1 << (bits - 1), (1 << bits) - 1
    for lane in range(_LANES):
        word, shift = divmod(lane * bits, 32)
        value = grouped[:, :, word] >> shift
        if shift + bits > 32:
            value = value | grouped[:, :, word + 1] << (32 - shift)
        lanes[:, :, lane] = (value & mask) - half
    return lanes.view(rows, groups * _LANES)[:, :columns].contiguous()


def _check(tensor: Tensor, bits: int, dtype: torch.dtype, what: str) -> None:
    if tensor.dtype != dtype or tensor.ndim != 2 or not 2 <= bits <= 8:
        raise ShapeError(
            f"{what} must be {dtype} with two dimensions and bits 2 to 8; found {tensor.dtype} "
            f"{list(tensor.shape)}, bits {bits}."
        )
