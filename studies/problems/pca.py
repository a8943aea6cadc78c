"""Online PCA: the leading eigenvector from a stream of samples, on the sphere or unconstrained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.problems.problem import Facts, Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlinePCA(Problem):
    """`-0.5 E (w.z)^2` over unit w, or `0.25 ||w w^T - Sigma||_F^2`, for z ~ N(0, Sigma).

    Sigma = diag(1 + gap, 1, noise, ..., noise). Every eigenvector but the first is a strict saddle.
    """

    num_dims: int = 10
    """d: number of coordinates, 2 or more."""
    gap: float = 0.5
    """Difference of the two largest eigenvalues: the downward curvature at the second eigenvector."""
    noise: float = 0.1
    """The other eigenvalues, below 1."""
    on_sphere: bool = True
    """Whether w is kept on the unit sphere; the loss then reads w divided by its norm."""

    def __post_init__(self) -> None:
        if self.num_dims < 2:
            raise ValueError(f"num_dims must be 2 or more; found {self.num_dims}.")
        if not self.gap > 0 or not 0 <= self.noise < 1:
            raise ValueError(f"gap must be above 0 and noise in [0, 1); found {self.gap} and {self.noise}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_dims,)

    def loss(self, x: Tensor) -> Tensor:
        spectrum = self._spectrum().to(x)
        quadratic = (spectrum * x.square()).sum(-1)
        norm = x.square().sum(-1)
        if self.on_sphere:
            return -0.5 * quadratic / norm
        return 0.25 * (norm.square() - 2 * quadratic + spectrum.square().sum())

    def draw(self, num_points: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """Samples z: `[num_points, batch_size, d]`, float32."""
        normal = torch.randn(num_points, batch_size, self.num_dims, generator=generator)
        return normal * self._spectrum().float().sqrt()

    def batch_loss(self, x: Tensor, batch: Tensor) -> Tensor:
        quadratic = (batch.to(x) @ x.unsqueeze(-1)).squeeze(-1).square().mean(-1)
        norm = x.square().sum(-1)
        if self.on_sphere:
            return -0.5 * quadratic / norm
        return 0.25 * (norm.square() - 2 * quadratic + float(self._spectrum().square().sum()))

    def project(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) if self.on_sphere else x

    def facts(self) -> Facts:
        first, second = torch.zeros(self.num_dims), torch.zeros(self.num_dims)
        first[0], second[1] = 1.0, 1.0
        spectrum = self._spectrum()
        if self.on_sphere:
            return Facts(
                saddles=(second,),
                minima=(first, -first),
                minimum_loss=-0.5 * (1 + self.gap),
                negative_curvature=self.gap,
            )
        top = math.sqrt(1 + self.gap)
        return Facts(
            saddles=(second, torch.zeros(self.num_dims)),
            minima=(top * first, -top * first),
            minimum_loss=0.25 * float(spectrum[1:].square().sum()),
            negative_curvature=self.gap,
            smoothness=12 * (1 + self.gap),
            hessian_lipschitz=12 * top,
            radius=2 * top,
        )

    def _spectrum(self) -> Tensor:
        spectrum = torch.full((self.num_dims,), self.noise, dtype=torch.float64)
        spectrum[0], spectrum[1] = 1 + self.gap, 1.0
        return spectrum
