"""Quantisation on the walk: equalise the group, round its layers, write codes and scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.compress.blocks import Group
from limbeck.compress.problem import LayerProblem
from limbeck.compress.quantize.grid import Grid, Quantized, encode
from limbeck.compress.walk import Solution, stored_state
from limbeck.errors import CompressionError
from limbeck.models.schemes import Scheme, tensors_of

Round = Callable[[LayerProblem, Grid], Quantized]
Equalize = Callable[[Sequence[LayerProblem], Grid], Tensor]


def grid_of(scheme: Scheme) -> Grid:
    """The grid of a scheme's weights."""
    return Grid(bits=scheme.bits, kind=scheme.kind, group_size=scheme.group_size, largest_code=scheme.largest_code)


class Quantize:
    """Codes and scales for every linear layer of a block."""

    def __init__(
        self,
        schemes: Callable[[str], Scheme],
        rounding: Round,
        equalize: Equalize | None = None,
        dtype_of: Callable[[str], torch.dtype] = lambda name: torch.float32,
    ) -> None:
        """What is done to the layers.

        Args:
          schemes: the scheme of a layer by its name, such as `layers.0.mlp.down_proj`.
          rounding: the solver.
          equalize: factors for the inputs of a group; None for none.
          dtype_of: dtype that a layer's scales are stored in, by the name of its weight within the block. The walk
            goes on with what will be read back, so scales are rounded at once.
        """
        self._schemes, self._round, self._equalize, self._dtype_of = schemes, rounding, equalize, dtype_of
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

    def solve(self, group: Group, problems: Sequence[LayerProblem]) -> Solution:
        """Layers of one input and one scheme are rounded as one: their rows are independent of each other."""
        factors = None
        if self._equalize is not None and group.norm is not None:
            factors = self._equalize(problems, grid_of(self._schemes(problems[0].name)))
            moments = problems[0].moments.scaled(1 / factors)
            problems = [LayerProblem(p.weight * factors, moments, p.name, p.mask) for p in problems]
        weights: dict[str, Tensor] = {}
        for scheme in dict.fromkeys(self._schemes(problem.name) for problem in problems):
            members = [problem for problem in problems if self._schemes(problem.name) == scheme]
            quantized = self._rounded(_stacked(members), scheme)
            rows = [len(problem.weight) for problem in members]
            parts = zip(quantized.codes.split(rows), quantized.scales.split(rows), strict=True)
            for problem, (codes, scales) in zip(members, parts, strict=True):
                name = problem.name.partition(f"layers.{group.block}.")[2]
                stored = scales.to(self._dtype_of(f"{name}.weight")).float()
                own = Quantized(codes, stored, quantized.grid)
                self._done[name] = own, scheme, _input_scale(problem)
                weights[problem.name] = own.dequantize()
        return Solution([weights[problem.name] for problem in problems], factors)

    def tensors(self, number: int, block: Any, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """The block's tensors, codes and scales in place of the weights that were rounded."""
        tensors = stored_state(block, dict(dtypes))
        for name, (quantized, scheme, input_scale) in self._done.items():
            dtype = dtypes[f"{name}.weight"]
            del tensors[f"{name}.weight"]
            scale = input_scale if scheme.activations == "static" else None
            tensors |= tensors_of(name, quantized.codes, quantized.scales, scheme, dtype, scale)
        self._done = {}
        return tensors

    def _rounded(self, problem: LayerProblem, scheme: Scheme) -> Quantized:
        grid = grid_of(scheme)
        if scheme.strategy != "tensor":
            return self._round(problem, grid)
        # One scale for the layer leaves nothing to solve but rounding.
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


def _input_scale(problem: LayerProblem) -> float:
    """For fixed activations: the largest input seen meets the largest E4M3 value."""
    return max(float(problem.moments.absolute_max.max()) / 448.0, 1e-10)
