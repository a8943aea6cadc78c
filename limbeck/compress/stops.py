"""Stops inside a block's forward pass, before each group of linear layers computes.

A group's weights may be changed at its stop: what follows in the same pass sees the changed layer, so a block is passed
once and every group is calibrated behind the compressed groups before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from limbeck.compress.blocks import Group
from limbeck.compress.folds import Fold
from limbeck.compress.method import Method, Record, Solution
from limbeck.compress.problem import PRUNED_FROM, LayerProblem, Moments, layer_error, retarget
from limbeck.errors import CompressionError
from limbeck.models.experts import UnfusedExperts


@contextmanager
def stopping(block: Any, stops: Sequence[Solving | Watching], valid: Tensor) -> Iterator[None]:
    """Stop at groups for the length of the context; valid: bool [n T], False on padding."""
    for experts in (module for module in block.modules() if isinstance(module, UnfusedExperts)):
        experts.valid = valid.flatten()
    handles = []
    for stop in stops:
        linears = [block.get_submodule(name) for name in stop.group.linears]
        handles += [linear.register_forward_pre_hook(stop) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def output_of(block: Any, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
    """What a block makes of hidden states, float [n T D], called with what else the model gives it."""
    output = block(hidden, **call)
    return output[0] if isinstance(output, tuple) else output


class Watching:
    """Keeps a group's input, [tokens I] without padding."""

    def __init__(self, group: Group, valid: Tensor) -> None:
        self.group, self._valid = group, valid
        self.seen: Tensor | None = None

    def __call__(self, module: Any, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            self.seen = _tokens(arguments[0], self._valid)


class Solving:
    """The hook of all the linear layers of a group: at the first of them that computes, the group is solved."""

    def __init__(
        self, group: Group, method: Method, valid: Tensor | None, fold: Fold | None, dense: Tensor | None
    ) -> None:
        """Args: `valid` as in `stopping`; `dense`: the dense model's inputs of the group, to aim at its outputs."""
        self.group, self.records = group, list[Record]()
        self._method, self._valid, self._fold, self._dense = method, valid, fold, dense
        self._is_done = False
        self._factors: Tensor | None = None

    def __call__(self, module: Any, arguments: tuple[Any, ...]) -> tuple[Tensor] | None:
        if not self._is_done:
            self._is_done = True
            problems, start = self._problems(arguments[0]), time.perf_counter()
            try:
                solution = self._method.solve(self.group, problems, self._fold)
            except torch.linalg.LinAlgError as error:
                raise _singular(self.group) from error
            self._take(problems, solution, start)
        return None if self._factors is None else (arguments[0] / self._factors,)

    def solve(self, moments: Moments) -> None:
        """Solve from moments that are at hand."""
        problems, start = _problems(self.group, moments), time.perf_counter()
        self._take(problems, self._method.solve(self.group, problems, self._fold), start)

    def _problems(self, inputs: Tensor) -> list[LayerProblem]:
        flat = inputs.reshape(-1, inputs.shape[-1]) if self._valid is None else _tokens(inputs, self._valid)
        problems = _problems(self.group, Moments.of(flat))
        if self._dense is None:
            return problems
        cross = self._dense.T @ flat / max(len(flat), 1)
        return [retarget(problem, cross) for problem in problems]

    def _take(self, problems: Sequence[LayerProblem], solution: Solution, start: float) -> None:
        """The new weights into the layers, and a record of each."""
        seconds = (time.perf_counter() - start) / len(problems)
        self._factors = solution.factors
        kept: Sequence[list[int] | None] = solution.kept or [None] * len(problems)
        linears = self.group.linears.values()
        for problem, linear, weight, groups in zip(problems, linears, solution.weights, kept, strict=True):
            own = LayerProblem(linear.weight.data, problem.moments, problem.name)
            error = layer_error(own, weight if self._factors is None else weight / self._factors)
            if not math.isfinite(error):
                raise CompressionError(f"{problem.name}: weights and inputs are too large to multiply in float32.")
            self.records.append(Record(problem.name, error, seconds, problem.moments.tokens, groups))
            linear.weight.data = weight


def _problems(group: Group, moments: Moments) -> list[LayerProblem]:
    return [
        LayerProblem(linear.weight.data, moments, f"layers.{group.block}.{name}", _mask(linear.weight.data))
        for name, linear in group.linears.items()
    ]


def _mask(weight: Tensor) -> Tensor | None:
    """What is not zero, in a layer that was pruned before; a few zeros are chance."""
    mask = weight != 0
    return mask if float(mask.float().mean()) < 1 - PRUNED_FROM else None


def _tokens(inputs: Tensor, valid: Tensor) -> Tensor:
    """[tokens I] without padding; what experts are given has none."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    if len(flat) == valid.numel() and not bool(valid.all()):
        return flat[valid.flatten()]
    return flat


def _singular(group: Group) -> CompressionError:
    return CompressionError(
        f"{group.name}: the second moments of its inputs cannot be factorised; calibrate on more text or raise damping."
    )
