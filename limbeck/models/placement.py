"""The one decision on device and number format, which every model is loaded by.

    device  auto: the accelerator of this process where there is one, else the CPU
    dtype   auto: bf16 on an accelerator that has it, else float32; weights in training are float32 in any case

The accelerator of a process is the one with its number on this machine (`runner.launch`), or the only one it sees.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from limbeck import placement
from limbeck.errors import ConfigError
from limbeck.progress import say
from limbeck.runner.launch import launched

NAMES = {torch.bfloat16: "bf16", torch.float32: "float32"}


class Placement(NamedTuple):
    """Where models are, and what those that are not trained are held and multiplied in."""

    device: torch.device
    dtype: torch.dtype

    @property
    def is_accelerator(self) -> bool:
        """Whether it is no CPU."""
        return self.device.type == "cuda"


def here() -> Placement:
    """What holds in this process now; the console is told once, and manifests have it.

    Raises: ConfigError for a device that is not there.
    """
    asked = placement.asked()
    device = _device(asked.device)
    found = Placement(device, _dtype(asked.dtype, device))
    if torch.cuda.is_available() or asked.dtype != "auto":
        _tell(found)
    placement.note(_facts(found))
    return found


def accelerator_name(device: torch.device) -> str:
    """What the driver calls an accelerator."""
    return str(_properties(device.index or 0)["name"])


def _device(asked: str) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, number = asked.partition(":")
    if kind == "cpu" or (kind == "auto" and not count):
        return torch.device("cpu")
    if not count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = f"torch {torch.__version__} sees none" + (f" of CUDA_VISIBLE_DEVICES {visible}" if visible else "")
        raise ConfigError(f"device {asked}: there is no CUDA device here ({reason}); take cpu or auto.")
    # A launcher may show each process a device of its own, which is then number 0 for all of them.
    launch = launched()
    chosen = int(number) if number else launch.local_rank if count > 1 else 0
    if chosen >= count:
        raise ConfigError(
            f"device {asked}: process {launch.local_rank} of this machine asks for cuda:{chosen}, of {count} there; "
            "start as many processes as there are devices."
        )
    return torch.device("cuda", chosen)


def _dtype(asked: str, device: torch.device) -> torch.dtype:
    if asked != "auto":
        return torch.bfloat16 if asked == "bf16" else torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


@functools.cache
def _tell(found: Placement) -> None:
    name = f"{found.device}, {_properties(found.device.index)['name']}" if found.is_accelerator else "cpu"
    say(f"device: {name}; {NAMES[found.dtype]} where nothing is trained")


@functools.cache
def _facts(found: Placement) -> dict[str, Any]:
    """For manifests: device, dtype and, of accelerators, what they are."""
    facts: dict[str, Any] = {"device": str(found.device), "dtype": NAMES[found.dtype]}
    if found.is_accelerator:
        count = torch.cuda.device_count()
        facts |= {
            "accelerators": [_properties(number) for number in range(count)],
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return facts


def _properties(number: int) -> dict[str, Any]:
    try:
        found = torch.cuda.get_device_properties(number)
    except (AssertionError, AttributeError, RuntimeError):  # a device that does not tell is no reason to end
        return {"name": "unknown", "memory_bytes": None}
    return {"name": found.name, "memory_bytes": found.total_memory}


def _driver() -> str | None:
    """Version of the kernel module; None where the system does not tell."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in line.split() if word[:1].isdigit()), None)
