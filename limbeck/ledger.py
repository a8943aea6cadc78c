"""The cost ledger: tokens, floating-point operations, seconds and peak memory of a run, split by who spends them.

FLOPs follow torch's own counting rules: a product of [m k] and [k n] is 2 m k n, attention is counted as the full
square although a causal kernel skips half of it, and the backward of attention is 2.5 times its forward. Element-wise
work is not counted, as there. The first step of a run is also counted by torch's counter, and the ledger keeps both.

Formulas, for a forward over sequences of T_i tokens (T in all), P weights in linear layers, A = layers x heads x
head size, N supervised positions, V vocabulary, D width:

    backbone forward   2 P T + 4 A sum T_i^2
    backbone backward  2 P_input T + 2 P_trainable T + 10 A sum T_i^2   (P_input: all weights but those whose input
                       needs no gradient; with gradient checkpointing the recomputed products and 4 A sum T_i^2 more)
    head               2 N V D forward, as much for the hidden gradient, as much for the head's own when it trains

Only what is computed counts: T and T_i leave out the tokens that the lean forward leaves out (models/lean.py), and the
weights behind the last layer's attention count for the positions that are read.
"""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from limbeck.models.anatomy import Computed, Sizes

FLOP_PARTS = ("teacher", "student", "head", "sampling")
COUNTS = ("tokens", "padded_tokens", "supervised_tokens", "sequences", "steps", "rollout_tokens")


class Ledger:
    """Accumulates the cost of one run; `as_dict` goes into the manifest, `restore` continues an interrupted run."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.counts = dict.fromkeys(COUNTS, 0)
        self.flops = dict.fromkeys(FLOP_PARTS, 0)
        self._seconds: dict[str, float] = {}
        self._clock = HostClock() if event_on(self.device) is None else DeviceClock()
        self.peak_bytes: dict[str, int] = {}
        self.audit: dict[str, float] = {}
        self._is_in_phase = False
        release_memory()
        self.baseline_bytes = memory_bytes(self.device)

    def count(self, **amounts: int) -> None:
        """Add to the counts of COUNTS."""
        for name, amount in amounts.items():
            self.counts[name] += amount

    def add_flops(self, **amounts: int) -> None:
        """Add FLOPs to the parts of FLOP_PARTS."""
        for name, amount in amounts.items():
            self.flops[name] += amount

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the seconds and the peak memory of the block to `name`; within another phase, to that one."""
        if self._is_in_phase:
            yield
            return
        self._is_in_phase = True
        reset_peak(self.device)
        start = self._clock.now()
        try:
            yield
        finally:
            self._is_in_phase = False
            self._clock.charge(name, start)
            self._take_seconds(wait=False)
            peak = peak_memory_bytes(self.device) - self.baseline_bytes
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak)

    def _take_seconds(self, wait: bool) -> None:
        for name, seconds in self._clock.read(wait):
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        """By phase; an accelerator is waited for."""
        self._take_seconds(wait=True)
        return self._seconds

    @property
    def seconds_so_far(self) -> float:
        """Of training, as far as they are known without waiting for an accelerator."""
        return _of_training(self._seconds)

    @property
    def train_seconds(self) -> float:
        """Seconds of everything but validation and saving."""
        return _of_training(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            **self.counts,
            "flops": {**self.flops, "total": sum(self.flops.values())},
            "flops_audit": dict(self.audit),
            "seconds": {name: round(value, 6) for name, value in self.seconds.items()},
            "train_seconds": round(self.train_seconds, 6),
            "peak_bytes": {**self.peak_bytes, "total": max(self.peak_bytes.values(), default=0)},
            "baseline_bytes": self.baseline_bytes,
        }

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Add the `as_dict` of what went before: an interrupted run that goes on, or an earlier stage."""
        for name in COUNTS:
            self.counts[name] += int(tree[name])
        for name in FLOP_PARTS:
            self.flops[name] += int(tree["flops"][name])
        self.audit = dict(tree["flops_audit"]) or self.audit
        for name, value in tree["seconds"].items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value
        for name, value in tree["peak_bytes"].items():
            if name != "total":
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), value)


class HostClock:
    """Seconds of blocks that compute on the CPU."""

    def __init__(self) -> None:
        self._done: list[tuple[str, float]] = []

    def now(self) -> Any:
        """The time, to charge a block from."""
        return time.perf_counter()

    def charge(self, name: str, start: Any) -> None:
        """Charge what has passed since `start`."""
        self._done.append((name, time.perf_counter() - start))

    def read(self, wait: bool) -> Sequence[tuple[str, float]]:
        """What was charged and not read yet."""
        done, self._done = self._done, []
        return done


def event_on(device: torch.device, **settings: bool) -> Any:
    """A mark for the queue of an accelerator; None on a CPU, and where torch was not built with marks."""
    try:
        return torch.cuda.Event(**settings) if device.type == "cuda" else None
    except RuntimeError:
        return None


class DeviceClock(HostClock):
    """Seconds of blocks that compute on an accelerator, by events in its queue, which nobody waits for."""

    def __init__(self) -> None:
        self._open: deque[tuple[str, Any, Any]] = deque()

    def now(self) -> Any:
        """An event where the device will be when it comes to what is asked for next."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def charge(self, name: str, start: Any) -> None:
        self._open.append((name, start, self.now()))

    def read(self, wait: bool) -> Sequence[tuple[str, float]]:
        """What the device is through with; with `wait`, all."""
        if wait and self._open:
            self._open[-1][2].synchronize()
        found = []
        while self._open and (wait or self._open[0][2].query()):
            name, start, stop = self._open.popleft()
            found.append((name, start.elapsed_time(stop) / 1000))
        return found


def _of_training(seconds: Mapping[str, float]) -> float:
    return sum(value for name, value in seconds.items() if name not in ("validation", "saving"))


def backbone_forward_flops(sizes: Sizes, computed: Computed) -> int:
    """FLOPs of one forward of the backbone."""
    products = sizes.linear_weights * computed.tokens - sizes.last_layer_weights * _left_out(computed)
    return 2 * products + 4 * sizes.attention_width * computed.attention_pairs


def backbone_backward_flops(sizes: Sizes, computed: Computed) -> int:
    """FLOPs of one backward of the backbone."""
    weights = sizes.input_gradient_weights + sizes.trainable_linear_weights + sizes.recomputed_linear_weights
    attention = 14 if sizes.recomputed_linear_weights else 10
    products = weights * computed.tokens - 2 * sizes.last_layer_weights * _left_out(computed)
    return 2 * products + attention * sizes.attention_width * computed.attention_pairs


def decoding_flops(sizes: Sizes, prompt_tokens: int, new_tokens: Sequence[int]) -> int:
    """FLOPs of several completions of one prompt over a key-value cache, the prompt read once.

    A completion of n tokens takes n - 1 forward passes of one token behind the prompt, each attending to all before it.
    Padding and finished rows that are computed along are not counted.
    """
    flops = backbone_forward_flops(sizes, Computed.whole([prompt_tokens])) + head_forward_flops(sizes, 1)
    for count in new_tokens:
        passes = max(0, count - 1)
        attended = passes * prompt_tokens + passes * (passes + 1) // 2
        flops += 2 * sizes.linear_weights * passes + 4 * sizes.attention_width * attended
        flops += head_forward_flops(sizes, passes)
    return flops


def _left_out(computed: Computed) -> int:
    return computed.tokens - computed.last_tokens


def head_forward_flops(sizes: Sizes, num_positions: int) -> int:
    """FLOPs of the logits of `num_positions` positions."""
    return 2 * num_positions * sizes.vocab_size * sizes.hidden_size


def head_flops(sizes: Sizes, num_positions: int) -> int:
    """FLOPs of the student's head: logits, hidden gradient, and the head's gradient when it trains."""
    return (3 if sizes.is_head_trainable else 2) * head_forward_flops(sizes, num_positions)


class FlopCounter(FlopCounterMode):
    """torch's counter, with formulas of our own for attention and for products added in place.

    torch's own refuse grouped queries up to 2.11. A formula that fails counts nothing and is told in `failed`: counting
    is bookkeeping, and no reason to end a run.
    """

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        own = {torch.ops.aten.addmm_: _added}
        own |= {getattr(torch.ops.aten, name): _attention for name in ATTENTIONS if hasattr(torch.ops.aten, name)}
        backward = {f"{name}_backward": _attention_backward for name in ATTENTIONS}
        own |= {getattr(torch.ops.aten, name): f for name, f in backward.items() if hasattr(torch.ops.aten, name)}
        super().__init__(display=False, custom_mapping={op: self._safe(f) for op, f in (flop_registry | own).items()})

    def _safe(self, formula: Callable[..., int]) -> Callable[..., int]:
        def count(*args: Any, **kwargs: Any) -> int:
            try:
                return formula(*args, **kwargs)
            except Exception as error:  # of any kind: see above
                self.failed["failed"] = f"{type(error).__name__}: {error}"[:200]
                return 0

        count._get_raw = True  # type: ignore[attr-defined]
        return count


ATTENTIONS = (
    *(f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn", "fused")),
    "_scaled_dot_product_flash_attention_for_cpu",
)


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 4 * query[..., 0].numel() * key.shape[-2] * query.shape[-1]


def _attention_backward(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    return _attention(query, key) * 5 // 2


def _added(_: Any, first: Any, second: Any, **__: Any) -> int:
    return 2 * first.shape[0] * first.shape[1] * second.shape[1]


def flop_counter() -> FlopCounter:
    """A counter for the length of a block."""
    return FlopCounter()


def memory_bytes(device: torch.device) -> int:
    """Bytes in use now: resident set on CPU, allocated on an accelerator."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS") or _max_resident_bytes()


def peak_memory_bytes(device: torch.device) -> int:
    """Largest bytes in use since `reset_peak`; since the process began where the kernel cannot reset it (not Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM") or _max_resident_bytes()


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return


def release_memory() -> None:
    """Hand freed memory back to the system, so that resident bytes mean bytes in use."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _max_resident_bytes() -> int:
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024
