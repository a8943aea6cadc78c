"""Noise that is a function of (seed, step, parameter, chunk), and of nothing else.

1. A parameter's logical (unsharded, row-major) elements are cut into fixed chunks.
2. A chunk's bits come from a counter-based generator whose key is (seed, parameter) and whose counter is
(chunk, step, stream). 3. A shard makes the chunks that it overlaps and keeps its own part.

So there is no generator state to save, and the same noise comes back after a resume, under any sharding and
world size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from limbeck.optim.sharding import Layout

CPU_CHUNK = 65_536
"""Elements of a chunk on the CPU: its temporaries stay in the cache."""
DEVICE_CHUNK = 1_048_576
"""Elements of a chunk on an accelerator: a chunk is one kernel launch."""
GAUSSIAN, ROUNDING, RADIUS, SIGNS = 0, 1, 2, 3
"""Streams: independent draws under one key."""
_WORD = 2**64 - 1
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Mantissa bits that float32 has and these types have not."""


class NoiseKey(NamedTuple):
    """What the noise of one parameter at one step depends on."""

    seed: int
    step: int
    parameter: int
    stream: int = GAUSSIAN


def parameter_id(name: str | int) -> int:
    """A stable 64-bit id of a parameter's name, or of its position when it has none."""
    return int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=8).digest(), "little")


def draw(key: NoiseKey, layout: Layout, device: torch.device) -> Tensor:
    """Standard normal noise, float32, of a parameter's local part.

    Args:
      layout: where the local part lies in the logical tensor.
    Returns: float32 of the shape `layout.local_shape`.
    """
    start, stop = layout.span()
    pieces = [
        gaussian_chunk(key, *piece[:2], device)[piece[2] : piece[3]]
        for piece in _pieces(start, stop, layout.numel, device)
    ]
    flat = torch.cat(pieces) if pieces else torch.empty(0, device=device)
    return layout.cut(flat)


def gaussian_chunk(key: NoiseKey, chunk: int, length: int, device: torch.device) -> Tensor:
    """`length` standard normal numbers, float32: Box-Muller on Philox bits on the CPU, the device's own elsewhere."""
    if device.type != "cpu":
        return torch.randn(length, device=device, generator=_device_generator(key, chunk, device))
    half = (length + 1) // 2
    bits = _philox(key, chunk, half)
    # 2^-33 keeps the logarithm finite; it is below the resolution of every other value.
    radius = (bits[:half] & 0x7FFFFFFF).float().mul_(2.0**-31).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
    angle = bits[half:].float().mul_(math.pi / 2**31)
    noise = torch.empty(2 * half)
    torch.mul(radius, angle.cos(), out=noise[:half])
    torch.mul(radius, angle.sin_(), out=noise[half:])
    return noise[:length]


def uniform(key: NoiseKey) -> float:
    """One number in (0, 1], from the stream RADIUS of the key."""
    word = _philox_words(key._replace(stream=RADIUS), 0, 1)
    return (int(word[0]) + 1) / 2**64


def add_noise_(
    value: Tensor,
    key: NoiseKey,
    layout: Layout,
    std: float | Tensor,
    *,
    stochastic: bool = False,
    direction: Tensor | None = None,
    lr: float | Tensor = 0.0,
    decay: float = 1.0,
) -> Tensor | float:
    """In place:  value <- decay * value - lr * direction + std * noise,  one chunk at a time.

    Args:
      value: the local part of a parameter, any float dtype.
      std: standard deviation of a coordinate; a device scalar leaves the host unsynchronised.
      stochastic: round the float32 sum to a neighbour in value's dtype with the probability that keeps its
        mean.
      direction: None leaves the descent to the caller.
    Returns: the squared norm of std * noise.
    """
    total: Tensor | float = 0.0
    for part, push, noise, bits in _rounded_segments(value, direction, key, layout, stochastic):
        total = total + square_norm(noise, std)
        if bits is None and push is None:
            _add_scaled_(part, noise, std)
            continue
        target = part.float() if bits is not None else part
        if push is not None:
            _add_scaled_(target.mul_(decay), push.to(target.dtype), -lr)
        _add_scaled_(target, noise, std)
        if bits is not None:
            part.copy_(round_stochastically(target, bits, part.dtype))
    return total


def round_stochastically(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 `value` in `dtype`, rounded up or down with the probabilities that keep the mean.

    Args:
      bits: int32, uniform random bits of value's shape.
      dtype: bfloat16 or float16 (whose subnormal numbers, below 6e-5, are rounded to the nearest).
    """
    dropped = _DROPPED_BITS[dtype]
    low = (1 << dropped) - 1
    rounded = ((value.view(torch.int32) + (bits & low)) & ~low).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(dtype)


def segments(tensors: list[Tensor], key: NoiseKey, layout: Layout) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Fresh noise for the local part of a parameter, chunk by chunk, beside the same windows of `tensors`.

    Args:
      tensors: of the parameter's local shape; the windows share their memory.
    """
    if not _is_flat(tensors, layout):
        yield tensors, draw(key, layout, tensors[0].device)
        return
    for windows, chunk, length, low, high in _chunks(tensors, layout):
        yield windows, gaussian_chunk(key, chunk, length, tensors[0].device)[low:high]


def square_norm(noise: Tensor, std: float | Tensor) -> Tensor | float:
    """||std * noise||^2."""
    flat = noise.reshape(-1)
    square = torch.dot(flat, flat)
    if noise.device.type == "cpu" and not isinstance(std, Tensor):
        return std * std * float(square)
    return square * std * std


def _rounded_segments(
    value: Tensor, direction: Tensor | None, key: NoiseKey, layout: Layout, stochastic: bool
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor | None]]:
    """Windows of value and direction, their noise, and the bits of the stochastic rounding."""
    tensors = [value] if direction is None else [value, direction]
    rounding = key._replace(stream=ROUNDING)
    if not _is_flat(tensors, layout):
        bits = layout.cut(_all_bits(rounding, layout, value.device)) if stochastic else None
        yield value, direction, draw(key, layout, value.device), bits
        return
    for windows, chunk, length, low, high in _chunks(tensors, layout):
        noise = gaussian_chunk(key, chunk, length, value.device)[low:high]
        bits = _bits_chunk(rounding, chunk, length, value.device)[low:high] if stochastic else None
        yield windows[0], None if direction is None else windows[1], noise, bits


def _is_flat(tensors: list[Tensor], layout: Layout) -> bool:
    """Whether the local part is one run of the logical elements, in memory too."""
    return layout.is_contiguous and all(tensor.is_contiguous() for tensor in tensors)


def _chunks(tensors: list[Tensor], layout: Layout) -> Iterator[tuple[list[Tensor], int, int, int, int]]:
    """Windows of the tensors, the chunk that each lies in, its length, and where in it the window lies."""
    flat, device = [tensor.view(-1) for tensor in tensors], tensors[0].device
    start, stop = layout.span()
    for chunk, length, low, high in _pieces(start, stop, layout.numel, device):
        here = chunk * _chunk_elements(device) + low - start
        yield [tensor[here : here + high - low] for tensor in flat], chunk, length, low, high


def _pieces(start: int, stop: int, numel: int, device: torch.device) -> Iterator[tuple[int, int, int, int]]:
    # (chunk, its length, first and last + 1 wanted element in it)
    size = _chunk_elements(device)
    for chunk in range(start // size, -(-stop // size)):
        base = chunk * size
        yield chunk, min(size, numel - base), max(start - base, 0), min(stop - base, size)


def _chunk_elements(device: torch.device) -> int:
    return CPU_CHUNK if device.type == "cpu" else DEVICE_CHUNK


def _all_bits(key: NoiseKey, layout: Layout, device: torch.device) -> Tensor:
    start, stop = layout.span()
    return torch.cat(
        [
            _bits_chunk(key, *piece[:2], device)[piece[2] : piece[3]]
            for piece in _pieces(start, stop, layout.numel, device)
        ]
    )


def _bits_chunk(key: NoiseKey, chunk: int, length: int, device: torch.device) -> Tensor:
    if device.type != "cpu":
        generator = _device_generator(key, chunk, device)
        return torch.randint(0, 2**31 - 1, (length,), device=device, generator=generator, dtype=torch.int32)
    return _philox(key, chunk, (length + 1) // 2)[:length]


def _philox(key: NoiseKey, chunk: int, words: int) -> Tensor:
    return torch.from_numpy(_philox_words(key, chunk, words).view(np.int32))


def _philox_words(key: NoiseKey, chunk: int, words: int) -> np.ndarray:
    # The generator's own counter is the lowest of the four words, so that no two chunks share a block.
    counter = np.array([0, chunk, key.step & _WORD, key.stream], dtype=np.uint64)
    secret = np.array([key.seed & _WORD, key.parameter & _WORD], dtype=np.uint64)
    return np.random.Philox(key=secret, counter=counter).random_raw(words)


def _device_generator(key: NoiseKey, chunk: int, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(repr((*key, chunk)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _add_scaled_(target: Tensor, change: Tensor, scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        target.add_(change * scale)
    else:
        target.add_(change, alpha=scale)
