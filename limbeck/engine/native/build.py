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
    path = _directory() / f"decode-{key.hexdigest()}.so"
    try:
        if not path.is_file():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Missing(f"the compiled kernels cannot be loaded ({error})") from error


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        found = shutil.which(name)
        if found is not None:
            return found
    raise Missing("there is no C++ compiler (CXX, c++, g++, clang++)")


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:  # several processes may be at it
        made = Path(scratch) / path.name
        command = [compiler, *FLAGS, "-w", str(SOURCES[0]), "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except subprocess.SubprocessError as error:
            told = str(getattr(error, "stderr", None) or error).strip().splitlines()
            raise Missing(f"{compiler} does not compile {SOURCES[0].name} here ({told[0][:200]})") from error
        made.replace(path)


def _directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limbeck"


def _machine() -> str:
    """What -march=native depends on: the cache may lie on a disk that several machines share."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
