"""The routines that limbeck relies on, run here at the sizes of real layers and compared with float64 on one thread.

A build of torch can be wrong for large matrices, or on several threads only, and says nothing. The last routine is one
that limbeck keeps away from: it is known to be wrong on many machines, and other code on them may use it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.engine.int8 import Int8Linear

_BATCH, _SIZE, _COLUMNS = 3, 192, 16
"""A few KV groups of a small model: large enough for the paths that fail."""


class Routine(NamedTuple):
    """One kind of product or factorisation."""

    name: str
    call: Callable[[torch.dtype], Tensor]
    """Computes the same in either type."""
    tolerance: float
    """Largest difference from float64, relative to the largest entry."""
    is_used: bool = True
    advice: str = "another build of torch; limbeck's results on this one are wrong"


class RoutineResult(NamedTuple):
    """What came of a routine on so many threads."""

    routine: Routine
    threads: int
    error: float
    """Relative to the largest entry; infinite where it raised."""

    @property
    def is_right(self) -> bool:
        """Written so that NaN is wrong."""
        return self.error <= self.routine.tolerance


def run(threads: int) -> list[RoutineResult]:
    """Every routine on one thread and on `threads`."""
    counts = sorted({1, threads})
    return [outcome for routine in _routines() for outcome in _tried(routine, counts)]


def _tried(routine: Routine, counts: list[int]) -> Iterator[RoutineResult]:
    with _threads(1):
        right = routine.call(torch.float64)
    for count in counts:
        with _threads(count), _hushed():
            try:
                difference = (routine.call(torch.float32).double() - right).abs().max()
                error = float(difference / right.abs().max())
            except RuntimeError:
                error = float("inf")
        yield RoutineResult(routine, count, error)


def _routines() -> list[Routine]:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(_BATCH, 4 * _SIZE, _SIZE, generator=draw, dtype=torch.float64)
    moments = inputs.mT @ inputs / (4 * _SIZE) + 0.01 * torch.eye(_SIZE, dtype=torch.float64)
    right = torch.randn(_BATCH, _SIZE, _COLUMNS, generator=draw, dtype=torch.float64)
    heads = torch.randn(3, 1, 4, _SIZE, 64, generator=draw, dtype=torch.float64)

    def attention(dtype: torch.dtype) -> Tensor:
        query, key, value = heads.to(dtype)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    def cholesky(dtype: torch.dtype) -> Tensor:
        return torch.linalg.cholesky(moments.to(dtype))

    def triangular(dtype: torch.dtype) -> Tensor:
        return torch.linalg.solve_triangular(cholesky(dtype), right.to(dtype), upper=False)

    found = [
        Routine("products", lambda dtype: moments.to(dtype) @ right.to(dtype), 1e-5),
        Routine("attention", attention, 1e-5),
        Routine("Cholesky", cholesky, 1e-4),
        Routine("Cholesky solve", lambda dtype: torch.cholesky_solve(right.to(dtype), cholesky(dtype)), 1e-3),
        Routine("Cholesky inverse", lambda dtype: torch.cholesky_inverse(cholesky(dtype)), 1e-3),
        Routine("triangular solve", triangular, 1e-3),
        Routine("eigenvalues", lambda dtype: torch.linalg.eigvalsh(moments.to(dtype)), 1e-4),
    ]
    if {"fbgemm", "x86"} & {torch.backends.quantized.engine}:
        found.append(Routine("int8 products", _int8(inputs[0], right[0]), 0.03))
    advice = (
        "nothing for limbeck, which does without; in code of your own, torch.set_num_threads(1) around solve, inv, det "
        "and slogdet of several matrices (pytorch issue 142815)"
    )

    def lu(dtype: torch.dtype) -> Tensor:
        return torch.linalg.solve(moments.to(dtype), right.to(dtype))

    return [*found, Routine("LU of several matrices", lu, 1e-3, is_used=False, advice=advice)]


def _int8(inputs: Tensor, weight: Tensor) -> Callable[[torch.dtype], Tensor]:
    """The product of the int8 engine beside the exact one."""
    layer = Int8Linear.rounded(weight.mT.float())

    def product(dtype: torch.dtype) -> Tensor:
        return inputs @ weight if dtype == torch.float64 else layer(inputs.float())

    return product


@contextmanager
def _hushed() -> Iterator[None]:
    """MKL prints what it finds wrong, past Python's streams."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, own in zip((1, 2), kept, strict=True):
            os.dup2(own, number)
        for descriptor in (nowhere, *kept):
            os.close(descriptor)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
