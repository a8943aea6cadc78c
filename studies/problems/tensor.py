"""Orthogonal tensor decomposition (Ge et al. 2015): find d orthonormal components at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.problems.problem import Facts, Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDecomposition(Problem):
    """`sum_{i != j} T(u_i, u_i, u_j, u_j)` for `T = sum_k e_k^{x4}` and unit rows u_i of x `[d, d]`.

    The loss reads each row divided by its norm, so that the gradient is tangent to the spheres; `project`
    renormalises. A sample is a mixture y of independent signs, whose fourth moments carry T: `E (u.y)^2
    (v.y)^2 = 1 + 2 (u.v)^2 - 2 T(u, u, v, v)` for unit u, v.

    Source: Ge, Huang, Jin, Yuan 2015, arXiv:1503.02101, the objective that needs no deflation; the moment
    identity is ours.
    """

    num_dims: int = 5
    """d: dimension and number of components, 2 or more."""

    def __post_init__(self) -> None:
        if self.num_dims < 2:
            raise ValueError(f"num_dims must be 2 or more; found {self.num_dims}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_dims, self.num_dims)

    def loss(self, x: Tensor) -> Tensor:
        overlaps = _unit_rows(x).square()
        return overlaps.sum(-2).square().sum(-1) - overlaps.square().sum((-2, -1))

    def draw(self, num_points: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """Random signs: `[num_points, batch_size, d]`, float32."""
        signs = torch.randint(2, (num_points, batch_size, self.num_dims), generator=generator)
        return signs.float() * 2 - 1

    def batch_loss(self, x: Tensor, batch: Tensor) -> Tensor:
        rows = _unit_rows(x)
        squares = (batch.to(x) @ rows.mT).square()
        moments = squares.sum(-1).square() - squares.square().sum(-1)
        cosines = (rows @ rows.mT).square().sum((-2, -1)) - self.num_dims
        pairs = self.num_dims * (self.num_dims - 1)
        return 0.5 * (pairs + 2 * cosines - moments.mean(-1))

    def project(self, x: Tensor) -> Tensor:
        return _unit_rows(x)

    def facts(self) -> Facts:
        return Facts(
            saddles=(torch.full(self.shape, 1 / math.sqrt(self.num_dims)),),
            minima=(torch.eye(self.num_dims),),
            minimum_loss=0.0,
            negative_curvature=8 / self.num_dims,
        )


def _unit_rows(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
