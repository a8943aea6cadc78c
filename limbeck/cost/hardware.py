"""Machines: a table of published peaks, and this machine as measured in a few seconds.

A roofline with two slopes: products run at `flops`, everything else at `bandwidth`. What a run reaches of the peak is
`efficiency`, an assumption for table entries and 1 for a measured machine, whose figures are already what it reaches.

Table: vendors' data sheets, dense products (no sparsity), bandwidth a direction and a device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from limbeck.engine.int8 import Int8Linear
from limbeck.errors import ConfigError, nearest

MEASURED = "measured"
GIGA, TERA = 1e9, 1e12
_PROBE_SIZE = 1024
_COPY_BYTES = 128 * 2**20
_PROBE_SECONDS = 0.25


class Hardware(NamedTuple):
    """One device, and how devices reach each other."""

    name: str
    flops: Mapping[str, float]
    """FLOP/s of dense products by number format: float32, bf16, fp8, int8; what is missing is not supported."""
    bandwidth: float
    """Bytes a second of its memory."""
    memory_bytes: float
    efficiency: float = 1.0
    """Share of the peak that training reaches (model FLOPs utilisation), and of the bandwidth that decoding does."""
    link_bandwidth: float = 0.0
    """Bytes a second and direction to the devices of the same node; 0: there are none."""
    network_bandwidth: float = 0.0
    """Bytes a second and direction to other nodes, a device's share."""
    devices_per_node: int = 1

    @property
    def is_accelerator(self) -> bool:
        """Whether it is no CPU."""
        return self.link_bandwidth > 0

    def rate(self, precision: str) -> float:
        """FLOP/s that products reach in a number format; float32 where it has none of that format."""
        return self.efficiency * self.flops.get(precision, self.flops["float32"])


DEVICES: dict[str, Hardware] = {
    "h100": Hardware(
        "h100", {"float32": 494 * TERA, "bf16": 989 * TERA, "fp8": 1979 * TERA, "int8": 1979 * TERA},
        3350 * GIGA, 80 * GIGA, 0.40, 450 * GIGA, 50 * GIGA, 8,
    ),
    "h200": Hardware(
        "h200", {"float32": 494 * TERA, "bf16": 989 * TERA, "fp8": 1979 * TERA, "int8": 1979 * TERA},
        4800 * GIGA, 141 * GIGA, 0.40, 450 * GIGA, 50 * GIGA, 8,
    ),
    "a100": Hardware(
        "a100", {"float32": 156 * TERA, "bf16": 312 * TERA, "int8": 624 * TERA},
        2039 * GIGA, 80 * GIGA, 0.45, 300 * GIGA, 25 * GIGA, 8,
    ),
    "a100-40gb": Hardware(
        "a100-40gb", {"float32": 156 * TERA, "bf16": 312 * TERA, "int8": 624 * TERA},
        1555 * GIGA, 40 * GIGA, 0.45, 300 * GIGA, 25 * GIGA, 8,
    ),
    "l40s": Hardware(
        "l40s", {"float32": 183 * TERA, "bf16": 362 * TERA, "fp8": 733 * TERA, "int8": 733 * TERA},
        864 * GIGA, 48 * GIGA, 0.40, 32 * GIGA, 12.5 * GIGA, 8,
    ),
    "mi300x": Hardware(
        "mi300x", {"float32": 654 * TERA, "bf16": 1307 * TERA, "fp8": 2615 * TERA, "int8": 2615 * TERA},
        5300 * GIGA, 192 * GIGA, 0.30, 448 * GIGA, 50 * GIGA, 8,
    ),
    "laptop-cpu": Hardware("laptop-cpu", {"float32": 400 * GIGA, "int8": 1200 * GIGA}, 50 * GIGA, 16 * GIGA, 0.5),
}  # fmt: skip
"""float32 of the accelerators is that of TF32 products. The laptop is a current one with 8 cores and AVX2."""


def device_named(name: str) -> Hardware | None:
    """The device of the table whose name is a part of what a driver calls it; None where there is none."""
    words = name.lower().replace("-", " ").split()
    return next((device for key, device in DEVICES.items() if key in words), None)


def hardware_of(name: str) -> Hardware:
    """A device of the table, or `measured`: this machine's CPU.

    Raises: ConfigError for an unknown name.
    """
    if name == MEASURED:
        return measure()
    if name not in DEVICES:
        raise ConfigError(f"hardware: no device {name!r}; {nearest(name, [*DEVICES, MEASURED])}")
    return DEVICES[name]


def measure() -> Hardware:
    """This machine's CPU with the threads that torch has now: float32 and int8 products, and a copy of memory."""
    left, right = torch.randn(2, _PROBE_SIZE, _PROBE_SIZE)
    product = 2.0 * _PROBE_SIZE**3
    flops = {"float32": product * _calls_a_second(lambda: left @ right)}
    if {"fbgemm", "x86"} & {torch.backends.quantized.engine}:
        layer = Int8Linear.rounded(right)
        flops["int8"] = product * _calls_a_second(lambda: layer(left))
    source, target = torch.ones(2, _COPY_BYTES // 4)
    # A copy reads and writes.
    bandwidth = 2.0 * _COPY_BYTES * _calls_a_second(lambda: target.copy_(source))
    return Hardware(MEASURED, flops, bandwidth, float(total_memory_bytes()))


def total_memory_bytes() -> int:
    """Memory of this machine; 0 where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return int(file.readline().split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0


def _calls_a_second(call: Callable[[], object]) -> float:
    """Calls a second on this machine as busy as it is, after one that warms up."""
    call()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < _PROBE_SECONDS:
        call()
        count += 1
    return count / (time.perf_counter() - start)
