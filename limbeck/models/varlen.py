"""Causal attention of packed sequences in one call a layer, where torch has a kernel for it: bf16 on an accelerator.

`torch.nn.attention.varlen` (torch 2.10 and later) is asked once a process whether it agrees with plain attention; where
it does not, or is not there, `attention.packed_attention` calls torch's attention once a sequence, which is exact
anywhere. Keywords differ between releases and are read off the function.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PROBED = (5, 9)
TOLERANCE = 0.02
"""Of outputs of order 1 in bf16."""


class Cuts(NamedTuple):
    """Where packed sequences begin and end, on the device that computes."""

    starts: Tensor
    """int32 [S + 1], from 0 to T."""
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Cuts:
        """Of sequences of these lengths; an accelerator is waited for."""
        starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return cls(starts.to(device), max(lengths))


def is_there(query: Tensor) -> bool:
    """Whether `attend` computes such queries."""
    return query.is_cuda and query.dtype == torch.bfloat16 and _agrees(query.device)


def attend(query: Tensor, key: Tensor, value: Tensor, cuts: Cuts, scale: float | None, window: int | None) -> Tensor:
    """softmax(scale q k') v within each sequence, causal.

    Args:
      query: [T N H]; key and value: [T N_kv H], N a multiple of N_kv.
      cuts: of the T tokens.
      scale: factor of the products; 1 / sqrt(H) when None.
      window: keys that a query sees, its own among them; None for all before it.
    Returns: [T N H].
    """
    function, known = _kernel()
    given: dict[str, Any] = {}
    if "window_size" in known:
        given["window_size"] = (-1 if window is None else window - 1, 0)
    if "is_causal" in known:
        given["is_causal"] = True
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            given["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if scale is not None and "scale" in known:
        given["scale"] = scale
    elif scale is not None:
        query = query * (scale * query.shape[-1] ** 0.5)
    longest = (cuts.longest, cuts.longest)
    found: Tensor = function(query, key, value, cuts.starts, cuts.starts, *longest, **given)
    return found


def one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None) -> Tensor:
    """The same, without a window, in a call a sequence: exact anywhere."""
    queries, keys, values = (x.transpose(0, 1)[None].split(list(lengths), 2) for x in (query, key, value))
    attention = nn.functional.scaled_dot_product_attention
    found = [
        attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(found, 2)[0].transpose(0, 1)


@functools.cache
def _kernel() -> tuple[Callable[..., Any], frozenset[str]]:
    """torch's function and its keywords.

    Raises: ImportError where this torch has none.
    """
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return function, frozenset(inspect.signature(function).parameters)


@functools.cache
@torch.no_grad()
def _agrees(device: torch.device) -> bool:
    """Whether two short sequences have the outputs of plain attention."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(PROBED), 4, 64, generator=random).to(device, torch.bfloat16)
    query, key, value = rows, rows[:, :2].flip(0).contiguous(), rows[:, 2:].contiguous()
    try:
        with torch.autocast(device.type, enabled=False):
            found = attend(query, key, value, Cuts.of(PROBED, device), None, None)
            plain = one_by_one(query, key, value, PROBED, None)
        return float((found - plain).abs().max()) < TOLERANCE
    except Exception:  # whatever this build says, it has no such kernel here
        return False
