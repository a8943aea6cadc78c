"""Files of JSON text, compressed or not, to decoded values: one a line, a list, one object over many lines.

What a file holds is found in the file: its suffix says only that it is JSON. Damage inside is handed on with its place.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow

from limbeck.errors import TraceFormatError


def _open_zstd(path: Path) -> IO[bytes]:
    return pyarrow.input_stream(str(path), compression="zstd")


OPENERS: dict[str, Callable[[Path], Any]] = {
    "": partial(Path.open, mode="rb"),
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}
"""By the suffix behind that of the kind."""
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, pyarrow.ArrowException)
_BLANK = " \t\r\n"


class Value(NamedTuple):
    """One decoded value of a file."""

    place: str
    """A line number, or `record N`, counted from 1."""
    value: Any
    problem: str | None = None
    """Why there is no value."""


def read_json(path: Path, compression: str) -> Iterator[Value]:
    """The values of a file: the lines, the entries of a list, or values that go on over several lines.

    Args:
      path: the file.
      compression: a key of OPENERS.
    Raises: TraceFormatError for a list that is not whole JSON; OSError; one of DAMAGED.
    """
    with OPENERS[compression](path) as file:
        begin = [line for _, line in zip(range(2), _full_lines(file), strict=False)]
    if not begin:
        return iter(())
    first = _decode_line(begin[0], "1")
    if first.problem is None and not (isinstance(first.value, list) and len(begin) == 1):
        return _read_lines(path, compression)
    return _read_whole(path, compression)


def decode(text: str) -> Any:
    """A JSON text.

    Raises: ValueError, also for one that is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _full_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines that are not blank, without a byte order mark."""
    for number, line in enumerate(_lines(file)):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
        if content.strip():
            yield content


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines with their ends; pyarrow's streams have no iterator that keeps to b"\\n"."""
    rest = b""
    while chunk := file.read(1 << 20):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in whole)
    if rest:
        yield rest


def _read_lines(path: Path, compression: str) -> Iterator[Value]:
    with OPENERS[compression](path) as file:
        for number, line in enumerate(_lines(file), start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                yield _decode_line(content, str(number))


def _decode_line(line: bytes, place: str) -> Value:
    try:
        return Value(place, decode(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Value(place, None, f"not UTF-8: byte {error.start + 1} of the line, {error.reason}")
    except json.JSONDecodeError as error:
        if not line.endswith(b"\n"):
            return Value(place, None, f"cut off: the last line is not whole JSON, {error.msg}")
        return Value(place, None, f"not JSON: {error.msg} at column {error.colno}")
    except ValueError as error:
        return Value(place, None, f"not JSON: {str(error)[:80]}")


def _read_whole(path: Path, compression: str) -> Iterator[Value]:
    """A list, or values behind one another with any blank space between; lines where the first one is no JSON."""
    with OPENERS[compression](path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise TraceFormatError(f"{path}: not UTF-8: byte {error.start + 1}, {error.reason}.") from error
        yield from _read_lines(path, compression)
        return
    values = list(_stream(text))
    if len(values) == 1 and isinstance(values[0].value, list):
        yield from (Value(f"record {number}", entry) for number, entry in enumerate(values[0].value, start=1))
    elif values[0].problem is None:
        yield from values
    elif text.lstrip().startswith("[") and not _has_lines(text):
        raise TraceFormatError(f"{path}:{values[0].place}: {values[0].problem}; expected a list.")
    else:
        yield from _read_lines(path, compression)


def _has_lines(text: str) -> bool:
    """Whether the second line is JSON by itself, so that a broken first one is no list that goes on."""
    lines = text.lstrip().split("\n", 2)
    return len(lines) > 1 and _decode_line(lines[1].encode(), "2").problem is None


def _stream(text: str) -> Iterator[Value]:
    """JSON values that follow one another; after the first that is none, nothing more."""
    decoder, start, line = json.JSONDecoder(), 0, 1
    while True:
        begin = start
        while begin < len(text) and text[begin] in _BLANK:
            begin += 1
        line += text.count("\n", start, begin)
        if begin == len(text):
            return
        try:
            value, end = decoder.raw_decode(text, begin)
        except json.JSONDecodeError as error:
            yield Value(str(error.lineno), None, f"not JSON: {error.msg} at column {error.colno}")
            return
        except (ValueError, RecursionError) as error:
            yield Value(str(line), None, f"not JSON: {str(error)[:80]}")
            return
        yield Value(str(line), value)
        line += text.count("\n", begin, end)
        start = end
