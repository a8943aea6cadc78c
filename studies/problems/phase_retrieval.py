"""Phase retrieval: find x* (up to its sign) from squared measurements `(a_i . x*)^2`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.problems.problem import Facts, Problem, TiltedProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseRetrieval(TiltedProblem):
    """Infinitely many Gaussian measurements: `(3 |x|^4 + 3 |x*|^4 - 2 |x|^2 |x*|^2 - 4 (x.x*)^2) / 4`.

    Saddles are the points orthogonal to x* with `|x| = |x*| / sqrt(3)`, curvature `-2 |x*|^2` along x*; 0 is
    a local maximum.
    """

    num_dims: int = 10
    """d: number of coordinates, 2 or more."""
    signal_norm: float = 1.0
    """|x*|; x* lies on the first axis."""

    def __post_init__(self) -> None:
        _check_phase(self.num_dims, self.signal_norm)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_dims,)

    def escape_coordinate(self, x: Tensor) -> Tensor:
        """x along x*: `[..., d]` to `[...]`."""
        return x[..., 0]

    def loss(self, x: Tensor) -> Tensor:
        norm, signal = x.square().sum(-1), self.signal_norm**2
        overlap = self.signal_norm * x[..., 0]
        return 0.25 * (3 * norm.square() + 3 * signal**2 - 2 * norm * signal - 4 * overlap.square())

    def facts(self) -> Facts:
        minimum, saddle = torch.zeros(self.num_dims), torch.zeros(self.num_dims)
        minimum[0], saddle[1] = self.signal_norm, self.signal_norm / math.sqrt(3)
        radius = 2 * self.signal_norm
        return Facts(
            saddles=(saddle, torch.zeros(self.num_dims)),
            minima=(minimum, -minimum),
            minimum_loss=0.0,
            negative_curvature=2 * self.signal_norm**2,
            smoothness=9 * radius**2 - self.signal_norm**2,
            hessian_lipschitz=18 * radius,
            radius=radius,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledPhaseRetrieval(Problem):
    """A finite set of measurements: `1/(4m) sum_i ((a_i.x)^2 - (a_i.x*)^2)^2`; x* lies on the first axis."""

    num_dims: int = 10
    """d: number of coordinates, 2 or more."""
    num_samples: int = 200
    """m: number of measurements."""
    signal_norm: float = 1.0
    """|x*|."""
    seed: int = 0
    """Seed of the measurement vectors."""

    def __post_init__(self) -> None:
        _check_phase(self.num_dims, self.signal_norm)
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more; found {self.num_samples}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_dims,)

    def loss(self, x: Tensor) -> Tensor:
        vectors = _measurements(self.num_samples, self.num_dims, self.seed).to(x)
        return self._residual(x @ vectors.T, vectors).square().mean(-1) / 4

    def draw(self, num_points: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """Indices of measurements, with replacement: `[num_points, batch_size]`, int64."""
        return torch.randint(self.num_samples, (num_points, batch_size), generator=generator)

    def batch_loss(self, x: Tensor, batch: Tensor) -> Tensor:
        vectors = _measurements(self.num_samples, self.num_dims, self.seed).to(x)[batch]
        return self._residual((vectors @ x.unsqueeze(-1)).squeeze(-1), vectors).square().mean(-1) / 4

    def facts(self) -> Facts:
        minimum = torch.zeros(self.num_dims)
        minimum[0] = self.signal_norm
        weights = _measurements(self.num_samples, self.num_dims, self.seed)
        targets = (self.signal_norm * weights[:, 0]).square()
        hessian_at_zero = (weights * targets.unsqueeze(-1)).T @ weights / self.num_samples
        return Facts(
            saddles=(torch.zeros(self.num_dims),),
            minima=(minimum, -minimum),
            minimum_loss=0.0,
            negative_curvature=float(torch.linalg.eigvalsh(hessian_at_zero)[-1]),
        )

    def _residual(self, products: Tensor, vectors: Tensor) -> Tensor:
        return products.square() - (self.signal_norm * vectors[..., 0]).square()


@functools.lru_cache(maxsize=8)
def _measurements(num_samples: int, num_dims: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, num_dims, generator=generator, dtype=torch.float64)


def _check_phase(num_dims: int, signal_norm: float) -> None:
    if num_dims < 2:
        raise ValueError(f"num_dims must be 2 or more; found {num_dims}.")
    if not signal_norm > 0:
        raise ValueError(f"signal_norm must be above 0; found {signal_norm}.")
