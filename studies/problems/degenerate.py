"""Negative controls: saddles that are not strict, where no first-order method has an O(log d) law."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from studies.problems.problem import Facts, TiltedProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class MonkeySaddle(TiltedProblem):
    """`x^3 - 3 x y^2`: zero Hessian at the origin, unbounded below along three valleys."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    def loss(self, x: Tensor) -> Tensor:
        a, b = x[..., 0], x[..., 1]
        return a**3 - 3 * a * b.square()

    def facts(self) -> Facts:
        return Facts(saddles=(torch.zeros(2),), negative_curvature=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepLinear(TiltedProblem):
    """`0.5 ||W_K ... W_1 - target * I||_F^2` of K square layers `[K, w, w]`.

    At zero every derivative below the K-th vanishes: a strict saddle for K = 2, not strict for K >= 3.
    """

    num_layers: int = 3
    """K: number of layers, 2 or more."""
    width: int = 4
    """w: rows and columns of each layer."""
    target: float = 1.0
    """The product to reach is this multiple of the identity."""

    def __post_init__(self) -> None:
        if self.num_layers < 2 or self.width < 1 or not self.target > 0:
            found = f"{self.num_layers}, {self.width} and {self.target}"
            raise ValueError(f"num_layers must be 2 or more, width 1 or more, target above 0; found {found}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_layers, self.width, self.width)

    def loss(self, x: Tensor) -> Tensor:
        product = x[..., 0, :, :]
        for layer in range(1, self.num_layers):
            product = x[..., layer, :, :] @ product
        return 0.5 * (product - self.target * torch.eye(self.width).to(x)).square().sum((-2, -1))

    def facts(self) -> Facts:
        scale = self.target ** (1 / self.num_layers)
        return Facts(
            saddles=(torch.zeros(self.shape),),
            minima=(scale * torch.eye(self.width).expand(self.shape),),
            minimum_loss=0.0,
            negative_curvature=self.target if self.num_layers == 2 else 0.0,
        )
