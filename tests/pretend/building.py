"""The hooks as a library, compiled once for each torch and kept; loaded before torch is."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("hooks.cpp")


def torch_folder() -> Path:
    """Of the package, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def why_not() -> str | None:
    """Why there can be no pretend device here; None where there can."""
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return "this torch is built for CUDA; run the contracts on a real device (pytest -m gpu)"
    return None if shutil.which("g++") else "there is no C++ compiler (g++)"


def library() -> Path:
    """The compiled hooks."""
    key = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "limbeck" / "pretend"
    cache.mkdir(parents=True, exist_ok=True)
    found = cache / f"hooks-{key}.so"
    if not found.exists():
        root = torch_folder()
        with tempfile.NamedTemporaryFile(dir=cache, suffix=".so") as made:
            command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", "-o", made.name]
            command += [str(SOURCE), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"]
            subprocess.run(command, check=True)
            os.link(made.name, found.with_suffix(".new"))
        found.with_suffix(".new").replace(found)
    return found


def answers() -> Path:
    """A cache for what is found out on the device, as it is now."""
    own = b"".join(file.read_bytes() for file in sorted(SOURCE.parent.glob("*.py")))
    return library().parent / f"answers-{hashlib.sha256(own).hexdigest()[:16]}"


def load() -> None:
    """Into this process, which must not have imported torch."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
