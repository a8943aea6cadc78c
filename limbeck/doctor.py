"""`limbeck doctor`: one page about this machine in seconds, what is wrong with it for limbeck, and what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from limbeck import selftest
from limbeck.config import checked
from limbeck.cost.hardware import total_memory_bytes
from limbeck.engine.native.build import Missing, library
from limbeck.lazy import make_callable
from limbeck.progress import console
from limbeck.stage import View
from limbeck.version import __version__

GIB = 2**30
_LITTLE_MEMORY, _LITTLE_DISK = 4 * GIB, 2 * GIB
_COLOURS = {"good": "green", "note": "yellow", "wrong": "red"}


@checked
class DoctorConfig:
    """Nothing to set."""


class Check(NamedTuple):
    """One line of the page."""

    about: str
    state: Literal["good", "note", "wrong"]
    """note: something is missing or slow; wrong: results are wrong, or limbeck does not run."""
    found: str
    advice: str = ""


class Diagnosis(NamedTuple):
    """The page."""

    checks: tuple[Check, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.state != "wrong" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"is_sound": self.is_sound, "checks": [check._asdict() for check in self.checks]}


def run(config: DoctorConfig) -> Diagnosis:
    """Look at versions, threads, devices, memory, disk, compiler and extras, and test the numerics."""
    parts = (_versions(), _threads(), _devices(), _memory(), _disk(), _compiler(), _extras(), _numerics())
    return Diagnosis(tuple(check for part in parts for check in part))


def show(found: Diagnosis) -> None:
    """Print the page."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "found", "what to do"):
        table.add_column(column)
    for check in found.checks:
        table.add_row(Text(check.about), Text(check.found, style=_COLOURS[check.state]), Text(check.advice))
    console.print(table, highlight=False)
    wrong = [check.about for check in found.checks if check.state == "wrong"]
    console.print(f"wrong: {', '.join(wrong)}" if wrong else "Nothing is wrong.", highlight=False)


def _versions() -> Iterator[Check]:
    yield Check("limbeck", "good", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for needed in _requirements(extra=False):
        version = _version(needed.name)
        if version is None:
            yield Check(needed.name, "wrong", "missing", f"pip install '{needed.name}{needed.specifier}'")
        elif not needed.specifier.contains(version, prereleases=True):
            advice = f"limbeck needs {needed.specifier}: pip install '{needed.name}{needed.specifier}'"
            yield Check(needed.name, "wrong", version, advice)
    names = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    yield Check("libraries", "good", ", ".join(f"{name} {_version(name)}" for name in names))
    blas = re.search(r"oneAPI Math Kernel Library Version (\S+)", torch.__config__.show())
    capability = torch.backends.cpu.get_cpu_capability()
    yield Check("products", "good", f"{'MKL ' + blas[1] if blas else 'no MKL'}, {capability}")


def _threads() -> Iterator[Check]:
    cores, threads = _cores(), torch.get_num_threads()
    found = f"{threads} threads of torch, {cores} cores for this process"
    if threads > cores:
        yield Check("threads", "note", found, f"export OMP_NUM_THREADS={cores}: waiting threads are slow")
    else:
        yield Check("threads", "good", found)


def _cores() -> int:
    """Cores that this process may use, by affinity and by the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return cores if quota == "max" else max(min(cores, -(-int(quota) // int(period))), 1)
    except (OSError, ValueError):
        return cores


def _devices() -> Iterator[Check]:
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        yield Check(f"GPU {number}", "good", f"{found.name}, {found.total_memory / GIB:.0f} GiB")
    if torch.cuda.device_count():
        return
    if shutil.which("nvidia-smi") is not None:
        advice = "a GPU is here, and this torch does not see it: install torch's build for your CUDA driver"
        yield Check("devices", "note", f"CPU; torch {torch.__version__}", advice)
    else:
        yield Check("devices", "good", "CPU")


def _memory() -> Iterator[Check]:
    total, free = total_memory_bytes(), _available_bytes()
    if not total:
        yield Check("memory", "note", "the system does not tell")
        return
    state: Literal["good", "note"] = "note" if free < _LITTLE_MEMORY else "good"
    advice = "see what a run takes first: --dry-run" if state == "note" else ""
    yield Check("memory", state, f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", advice)


def _available_bytes() -> int:
    """What is free, within the container's limit."""
    found = re.search(r"MemAvailable:\s+(\d+)", _text("/proc/meminfo"))
    free = int(found[1]) * 1024 if found else total_memory_bytes()
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _disk() -> Iterator[Check]:
    for about, path in (("disk here", Path.cwd()), ("disk for scratch files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(path).free
        is_little = free < _LITTLE_DISK
        advice = "models and caches need more: another --out, or TMPDIR" if is_little else ""
        yield Check(about, "note" if is_little else "good", f"{free / GIB:.1f} GiB free", advice)


def _compiler() -> Iterator[Check]:
    try:
        library()
        yield Check("compiler", "good", "decoding has compiled kernels")
    except Missing as error:
        yield Check("compiler", "note", str(error), "install g++ or clang++; torch decodes without, more slowly")


def _extras() -> Iterator[Check]:
    for name, missing in sorted(_missing_of_extras().items()):
        advice = f"pip install 'limbeck[{name}]', if you want it" if missing else ""
        lacks = f"no {', '.join(missing)}" if missing else "there"
        yield Check(f"extra {name}", "note" if missing else "good", lacks, advice)
    if importlib.util.find_spec("compressed_tensors") is None:
        yield Check("certificates", "note", "no compressed-tensors", "pip install compressed-tensors, for export")


def _missing_of_extras() -> dict[str, list[str]]:
    """Extra -> its packages that are not installed."""
    extras: dict[str, list[str]] = {}
    for needed in _requirements(extra=True):
        found = re.search(r"extra\s*==\s*['\"]([^'\"]+)", str(needed.marker))
        if found and needed.name != "limbeck" and found[1] not in ("dev", "docs", "bench"):
            extras.setdefault(found[1], []).extend([needed.name] if _version(needed.name) is None else [])
    return extras


def _requirements(*, extra: bool) -> list[Requirement]:
    """What limbeck's own metadata asks for, with its extras or without; nothing where it is not installed."""
    try:
        lines = metadata.requires("limbeck") or []
    except metadata.PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [needed for needed in found if ("extra" in str(needed.marker)) == extra]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numerics() -> Iterator[Check]:
    outcomes = selftest.run(max(_cores(), 2))
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    used = {outcome.routine.name for outcome in outcomes if outcome.routine.is_used}
    bad = {outcome.routine.name for outcome in wrong}
    yield Check("numerics", "good", f"{len(used - bad)} of {len(used)} kinds of routines agree with float64")
    for outcome in wrong:
        state: Literal["note", "wrong"] = "wrong" if outcome.routine.is_used else "note"
        how = f"on {outcome.threads} thread{'s' if outcome.threads > 1 else ''}"
        found = "raises an error" if outcome.error == float("inf") else f"wrong by {outcome.error:.1%}"
        yield Check(outcome.routine.name, state, f"{found} {how}", outcome.routine.advice)


def _as_dict(found: Diagnosis) -> Mapping[str, Any]:
    return found.as_dict()


DOCTOR = View(name="doctor", config=DoctorConfig, run=run, show=show, as_dict=_as_dict)

make_callable(__name__)
