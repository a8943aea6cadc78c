"""Quantisation on the walk: equalise the group, round its layers, write codes and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.compress.blocks import Blocks, Group
from limbeck.compress.folds import Fold
from limbeck.compress.method import Solution, stored_state
from limbeck.compress.problem import LayerProblem
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.quantize.grid import FP8_LARGEST, SMALLEST_SCALE, Grid, Quantized, encode, storable
from limbeck.errors import CompressionError
from limbeck.models.schemes import Scheme, tensors_of

Round = Callable[[LayerProblem, Grid, Any], Quantized]
Equalize = Callable[[Sequence[LayerProblem], Grid], Tensor]


def grid_of(scheme: Scheme, scale_dtype: torch.dtype = torch.float32) -> Grid:
    """The grid of a scheme's weights."""
    return Grid(
        bits=scheme.bits,
        kind=scheme.kind,
        group_size=scheme.group_size,
        largest_code=scheme.largest_code,
        scale_dtype=scheme.scale_dtype or scale_dtype,
    )


class Quantize:
    """Codes and scales for every linear layer of a block."""

    def __init__(
        self,
        schemes: Mapping[str, Scheme],
        rounding: Round,
        settings: Any,
        equalize: Equalize | None = None,
        dtype_of: Callable[[str], torch.dtype] = lambda name: torch.float32,
        pattern: Pattern | None = None,
    ) -> None:
        """What is done to the layers.

        Args:
          schemes: the scheme of a layer by its name, such as `layers.0.mlp.down_proj`.
          rounding: the solver, and its settings.
          equalize: factors for the inputs of a group; None for none.
          dtype_of: dtype that a weight is stored in, by its name within the block; a layer's scales have the same.
          pattern: that the solver finds zeros by, too.
        """
        self._schemes, self._round, self._settings = schemes, rounding, settings
        self._equalize, self._dtype_of, self._pattern = equalize, dtype_of, pattern
        self.folds = equalize is not None
        self._done: dict[str, tuple[Quantized, Scheme, float]] = {}

    def wants(self, group: Group) -> bool:
        """All groups but experts.

        Raises: CompressionError for experts: no stock loader reads quantised ones from one file for all families.
        """
        if any("experts." in name for name in group.linears):
            raise CompressionError(
                f"{group.name}: quantised experts are not supported; leave them dense with `--ignore '[experts]'`."
            )
        return True

    def check(self, blocks: Blocks, groups: Sequence[Group]) -> None:
        """Raises: CompressionError when nothing is left to round, or a layer's inputs do not divide into groups."""
        if not groups:
            raise CompressionError("every linear layer is to be ignored; there is nothing to quantise.")
        for group in groups:
            for name, linear in group.linears.items():
                layer = f"layers.{group.block}.{name}"
                grid_of(self._schemes[layer]).groups(linear.in_features, layer)
                if self._pattern is not None:
                    self._pattern.check(linear.in_features, layer)

    def solve(self, group: Group, problems: Sequence[LayerProblem], fold: Fold | None) -> Solution:
        """Layers of one input and one scheme are rounded as one: their rows are independent of each other."""
        names = {problem.name: problem.name.partition(f"layers.{group.block}.")[2] for problem in problems}
        kinds = {p.name: (self._schemes[p.name], self._dtype_of(f"{names[p.name]}.weight")) for p in problems}
        factors = None
        if self._equalize is not None and fold is not None:
            grid = grid_of(*kinds[problems[0].name]).fitted(*(problem.weight for problem in problems))
            factors, problems = self._equalized(self._equalize(problems, grid), problems, fold)
        weights: dict[str, Tensor] = {}
        for scheme, dtype in dict.fromkeys(kinds.values()):
            members = [problem for problem in problems if kinds[problem.name] == (scheme, dtype)]
            for problem, own in zip(members, self._rounded(members, scheme, dtype), strict=True):
                self._done[names[problem.name]] = own, scheme, _input_scale(problem, dtype)
                weights[problem.name] = own.dequantize()
        return Solution([weights[problem.name] for problem in problems], factors)

    def _rounded(self, problems: Sequence[LayerProblem], scheme: Scheme, dtype: torch.dtype) -> Iterator[Quantized]:
        stacked = _stacked(problems)
        grid = grid_of(scheme, dtype).fitted(stacked.weight)
        # One scale for the layer leaves nothing to solve but rounding.
        is_one_scale = scheme.strategy == "tensor"
        quantized = _one_scale(stacked, grid) if is_one_scale else self._round(stacked, grid, self._settings)
        rows = [len(problem.weight) for problem in problems]
        for codes, scales in zip(quantized.codes.split(rows), quantized.scales.split(rows), strict=True):
            yield Quantized(codes, scales, quantized.grid)

    def _equalized(
        self, factors: Tensor, problems: Sequence[LayerProblem], fold: Fold
    ) -> tuple[Tensor, list[LayerProblem]]:
        """The factors as they are stored, and the layers whose inputs are divided by them."""
        weight, factors = fold.folded(factors, self._dtype_of(fold.name))
        fold.apply(factors, weight)
        moments = problems[0].moments.scaled(1 / factors)
        return factors, [LayerProblem(p.weight * factors, moments, p.name, p.mask) for p in problems]

    def tensors(self, number: int, block: Any, blocks: Blocks) -> dict[str, Tensor]:
        """The block's tensors, codes and scales in place of the weights that were rounded."""
        tensors = stored_state(block, blocks.dtypes, without=[f"{name}.weight" for name in self._done])
        for name, (quantized, scheme, input_scale) in self._done.items():
            dtype = blocks.dtypes[f"{name}.weight"]
            scale = input_scale if scheme.activations == "static" else None
            tensors |= tensors_of(
                name, quantized.codes, quantized.scales, scheme, dtype, scale, quantized.grid.global_scale
            )
        self._done = {}
        return blocks.stored(number, tensors)


def _one_scale(problem: LayerProblem, grid: Grid) -> Quantized:
    largest = grid.scales(problem.weight, problem.name).max()
    return encode(problem.weight, largest.expand(len(problem.weight), 1).contiguous(), grid)


def _stacked(problems: Sequence[LayerProblem]) -> LayerProblem:
    if len(problems) == 1:
        return problems[0]
    masks = None
    if any(problem.mask is not None for problem in problems):
        masks = torch.cat([torch.ones_like(p.weight, dtype=torch.bool) if p.mask is None else p.mask for p in problems])
    weight = torch.cat([problem.weight for problem in problems])
    return LayerProblem(weight, problems[0].moments, problems[0].name, masks)


def _input_scale(problem: LayerProblem, dtype: torch.dtype) -> float:
    """For fixed activations: the largest input seen meets the largest E4M3 value."""
    scale = (problem.moments.absolute_max.max() / FP8_LARGEST).clamp(min=SMALLEST_SCALE)
    return float(storable(scale, dtype))
