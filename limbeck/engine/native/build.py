"""The library of `decode.cpp`: compiled when it is first needed, kept in the user's cache directory, loaded by ctypes.

A step of decoding is some 2,000 small calls of torch around a few milliseconds of products; here it is one. Only a C++
compiler is needed (`CXX`, c++, g++ or clang++), neither torch's headers nor a build system; compiling takes seconds.
Threads are those of torch, whose OpenMP library is loaded already.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = [Path(__file__).parent / name for name in ("decode.cpp", "products.h", "vectors.h")]
FLAGS = ["-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC"]
"""No fast-math and no contraction: the order of every sum is that of the source."""
COMPILE_SECONDS = 120


class Missing(Exception):
    """Why there is no library here."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises: Missing."""
    compiler = _compiler()
    key = hashlib.blake2b(digest_size=8)
    for part in (*(source.read_bytes() for source in SOURCES), *map(str.encode, (compiler, *FLAGS, _machine()))):
        key.update(part)
    stem = f"decode-{key.hexdigest()}"
    try:
        path = next(filter(_is_whole, _directory().glob(f"{stem}-*.so")), None) or _compile(compiler, stem)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Missing(f"the compiled kernels cannot be loaded ({error}); delete {_directory()}") from error


def _is_whole(path: Path) -> bool:
    """Whether a file has the bytes that its name promises: loading one that was cut short ends the process."""
    return path.stem.rpartition("-")[2] == _digest(path)


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        found = shutil.which(name)
        if found is not None:
            return found
    raise Missing("there is no C++ compiler (CXX, c++, g++, clang++)")


def _compile(compiler: str, stem: str) -> Path:
    """Where the library lies, under a name with the digest of its bytes."""
    directory = _directory()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:  # several processes may be at it
        made = Path(scratch) / "decode.so"
        command = [compiler, *FLAGS, "-w", str(SOURCES[0]), "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except subprocess.SubprocessError as error:
            told = str(getattr(error, "stderr", None) or error).strip().splitlines()
            raise Missing(f"{compiler} does not compile {SOURCES[0].name} here ({told[0][:200]})") from error
        return made.replace(directory / f"{stem}-{_digest(made)}.so")


def _directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limbeck"


def _machine() -> str:
    """What -march=native depends on: the cache may lie on a disk that several machines share."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
