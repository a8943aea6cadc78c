"""Coordinate descent over weights on a grid: where it stands, and its two moves.

Everything is transposed, [I O]: an input's weights are a contiguous row. Outputs do not depend on each other, so each
has an error of its own and keeps its own best weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.compress.problem import LayerProblem
from limbeck.compress.quantize.columns import round_in_turn
from limbeck.compress.quantize.grid import Grid, Quantized, encode

_LONGEST_BLOCK = 256
"""Groups up to here are settled as one block, and their scales with them; longer ones after the sweep."""


class Descent:
    """Weights B on their way to a smaller tr((B - W) H (B - W)'), H damped."""

    def __init__(self, problem: LayerProblem, weight: Tensor, scales: Tensor, damping: float, block: int) -> None:
        """From a weight [O I] and scales [O G]; blocks hold whole groups when these are short."""
        self.each = weight.shape[1] // scales.shape[1]
        self.short = self.each <= _LONGEST_BLOCK
        self.block = -(-block // self.each) * self.each if self.short else block
        self.hessian = problem.moments.damped(damping)
        self.diagonal = self.hessian.diagonal().contiguous()
        # Row j: how the best value of input j answers to the errors of the other inputs.
        self.coupling = (self.hessian / self.diagonal[:, None]).fill_diagonal_(0.0)
        self.target, self.values = problem.weight.T.contiguous(), weight.T.contiguous().clone()
        self.scales = scales.T.contiguous().clone()
        self.mask = None if problem.mask is None else problem.mask.T.contiguous()
        self.off = self.values - self.target
        self.error = (self.off * (self.hessian @ self.off)).sum(0, dtype=torch.float64)
        """float64 [O], of the weights as they are."""
        self.least, self.best, self.best_scales = self.error.clone(), self.values.clone(), self.scales.clone()

    def sweep(self, grid: Grid | None, refit: bool = False) -> None:
        """Every input in turn takes its best value on the grid, or of all values for None; block by block.

        One product gives what the inputs of a block want; within it, each still answers to those before it.

        Args:
          refit: then let every group's scale take its best value too.
        """
        steps = self.scales.repeat_interleave(self.each, dim=0)
        for start in range(0, len(self.target), self.block):
            rows = slice(start, start + self.block)
            old, answers = self.values[rows], self.coupling[rows]
            target = torch.addmm(self.target[rows], answers, self.off, alpha=-1)
            mask = None if self.mask is None else self.mask[rows]
            new, moves, wanted = round_in_turn(target, answers[:, rows], steps[rows], grid, mask, old)
            # Exact: along one weight the error is a parabola with its lowest point at `wanted`.
            self.error += self.diagonal[rows] @ (moves * (new + old - 2 * wanted))
            slopes = None
            if refit and self.short:
                slopes = (old - target) * self.diagonal[rows, None] + self.hessian[rows, rows] @ moves
            self._set(rows, new)
            if grid is not None and slopes is not None:
                self._refit(rows, slopes, grid)
        if grid is not None and refit and not self.short:
            self._refit(slice(0, len(self.target)), self.hessian @ self.off, grid)

    def _refit(self, rows: slice, slopes: Tensor, grid: Grid) -> None:
        """The scales of the groups in `rows` in turn, codes as they are; slopes [rows O] are those of the error, H off.

        Along one scale the error is a parabola: s moves by -slope / curvature.
        """
        hessian, base = self.hessian[rows, rows], rows.start
        for start in range(0, len(slopes), self.each):
            part, group = slice(start, start + self.each), slice(base + start, base + start + self.each)
            scale = self.scales[group.start // self.each]
            codes = self.values[group] / scale
            answer = hessian[:, part] @ codes
            slope, curvature = (codes * slopes[part]).sum(0), (codes * answer[part]).sum(0)
            move = -slope / curvature
            # A group of zeros has no curvature, and a scale must stay positive.
            move = torch.where((curvature > 0) & (move > -scale), grid.storable(scale + move) - scale, 0.0)
            self.error += move * (2 * slope + move * curvature)
            scale += move
            slopes += answer * move
            self._set(group, codes * scale)

    def _set(self, rows: slice, values: Tensor) -> None:
        self.values[rows] = values
        self.off[rows] = values - self.target[rows]

    def keep(self) -> None:
        """Outputs whose error is their least so far keep their weights; only for weights on the grid."""
        better = self.error < self.least
        self.least = torch.where(better, self.error, self.least)
        self.best = torch.where(better, self.values, self.best)
        self.best_scales = torch.where(better, self.scales, self.best_scales)

    def result(self, grid: Grid) -> Quantized:
        """The best weights kept."""
        return encode(self.best.T.contiguous(), self.best_scales.T.contiguous(), grid)
