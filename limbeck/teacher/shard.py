"""One immutable file of a teacher cache: token sequences in sorted order and a record of targets for each.

    magic, length and CRC-32 of the header | header (JSON) | index | ids and position masks | records

The index has the number of tokens, the bytes and the CRC-32 of the record of every sequence; the header has the CRC-32
of index and ids: every byte is covered. A shard is written to a temporary name, flushed and renamed, so what has its
name is whole. Sequences are compared as big-endian integers: the order of their bytes is that of their tokens, and a
sequence stands before all that it begins.
"""

from __future__ import annotations

import bisect
import json
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limbeck.errors import CheckpointError

MAGIC = b"LIMBECK1"
PARTIAL = ".partial"


class Stored(NamedTuple):
    """A sequence and the positions at which it is stored."""

    ids: np.ndarray
    """int32 [T]."""
    positions: np.ndarray
    """bool [T]: whether there are targets for predicting token t from those before it."""
    given: np.ndarray | None = None
    """int32: what the teacher reads instead of the first `replaced` tokens, which have no targets; None: the same."""
    replaced: int = 0

    def as_read(self) -> Stored:
        """The sequence that the teacher reads, with the positions at which it is asked."""
        if self.given is None:
            return self
        before = np.zeros(len(self.given), dtype=bool)
        return Stored(
            np.concatenate([self.given, self.ids[self.replaced :]]),
            np.concatenate([before, self.positions[self.replaced :]]),
        )


def id_type(vocab_size: int) -> str:
    """The smallest big-endian unsigned integer that holds every token id."""
    return ">u1" if vocab_size <= 2**8 else ">u2" if vocab_size <= 2**16 else ">u4"


def write_shard(
    path: Path, sequences: Sequence[Stored], records: Sequence[bytes], vocab_size: int, facts: Mapping[str, Any]
) -> None:
    """Write sequences, in sorted order, and their records; `facts` join the header."""
    index = np.array([[len(s.ids), len(r), zlib.crc32(r)] for s, r in zip(sequences, records, strict=True)], "<u4")
    ids = b"".join(s.ids.astype(id_type(vocab_size)).tobytes() + np.packbits(s.positions).tobytes() for s in sequences)
    header = json.dumps(
        {
            **facts,
            "sequences": len(sequences),
            "tokens": sum(len(s.ids) for s in sequences),
            "positions": sum(int(s.positions.sum()) for s in sequences),
            "index_crc32": zlib.crc32(index.tobytes()),
            "ids_crc32": zlib.crc32(ids),
        },
        sort_keys=True,
    ).encode()
    prefix = MAGIC + np.array([len(header), zlib.crc32(header)], "<u4").tobytes()
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        for part in (prefix, header, index.tobytes(), ids, *records):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Shard:
    """A shard on disk, mapped into memory. Opening checks header, index and ids; `record` checks what it reads."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path, self._type = path, np.dtype(id_type(vocab_size))
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(damaged(path, f"not readable: {error}")) from error
        start = len(MAGIC) + 8
        if len(self._data) < start or self._data[: len(MAGIC)] != MAGIC:
            raise CheckpointError(damaged(path, "no shard of a teacher cache"))
        size, crc = np.frombuffer(self._data[len(MAGIC) : start], "<u4").tolist()
        text = self._checked(start, size, crc, "header")
        self.header: dict[str, Any] = json.loads(text)
        num = self.header["sequences"]
        table = self._checked(start + size, 12 * num, self.header["index_crc32"], "index")
        index = np.frombuffer(table, "<u4").reshape(num, 3).astype(np.int64)
        self._lengths, self._crcs = index[:, 0], index[:, 2]
        sizes = self._lengths * self._type.itemsize + (self._lengths + 7) // 8
        self._ids = start + size + 12 * num + np.concatenate([[0], np.cumsum(sizes)])
        self._records = self._ids[-1] + np.concatenate([[0], np.cumsum(index[:, 1])])
        self._checked(int(self._ids[0]), int(sizes.sum()), self.header["ids_crc32"], "token ids")
        if len(self._data) != self._records[-1]:
            raise CheckpointError(damaged(path, f"{len(self._data)} bytes instead of {self._records[-1]}"))

    def __len__(self) -> int:
        return len(self._lengths)

    def find(self, ids: np.ndarray) -> Iterator[int]:
        """Indices of all sequences that `ids` begins, itself included."""
        key = ids.astype(self._type).tobytes()
        number = bisect.bisect_left(range(len(self)), key, key=self._key)
        while number < len(self) and self._key(number)[: len(key)] == key:
            yield number
            number += 1

    def sequence(self, number: int) -> Stored:
        """Token ids and stored positions of a sequence."""
        start, length = int(self._ids[number]), int(self._lengths[number])
        middle = start + length * self._type.itemsize
        ids = np.frombuffer(self._data[start:middle], self._type).astype(np.int32)
        bits = np.frombuffer(self._data[middle : int(self._ids[number + 1])], np.uint8)
        return Stored(ids, np.unpackbits(bits, count=length).astype(bool))

    def record(self, number: int) -> bytes:
        """The record of a sequence.

        Raises: CheckpointError when its checksum does not fit.
        """
        start, end = self._records[number : number + 2].tolist()
        return self._checked(start, end - start, int(self._crcs[number]), f"record {number}")

    def verify(self) -> None:
        """Read every byte. Raises: CheckpointError at the first that is wrong."""
        for number in range(len(self)):
            self.record(number)

    def _key(self, number: int) -> bytes:
        start = int(self._ids[number])
        return self._data[start : start + int(self._lengths[number]) * self._type.itemsize]

    def _checked(self, start: int, size: int, crc: int, what: str) -> bytes:
        data = self._data[start : start + size]
        if len(data) != size or zlib.crc32(data) != crc:
            raise CheckpointError(damaged(self.path, f"the checksum of its {what} does not fit"))
        return data


def damaged(path: Path, why: str) -> str:
    """The message for a file of a cache that cannot be trusted."""
    return f"{path}: damaged ({why}); run the command that wrote the cache again: it writes this file alone anew."
