"""Low-rank matrices: factorisation, sensing and completion. U = 0 is the canonical saddle."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.problems.problem import Facts, Problem, TiltedProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixFactorisation(TiltedProblem):
    """`0.5 ||U U^T - M||_F^2`, U `[n, r]`, M = diag(top, ..., 1, 0, ..., 0) of rank r, evenly spaced.

    Every rank-deficient truncation of the minimiser is a strict saddle.
    """

    num_rows: int = 10
    """n: rows of U."""
    rank: int = 2
    """r: columns of U, and the rank of M."""
    top_eigenvalue: float = 2.0
    """Largest eigenvalue of M, 1 or more; the smallest non-zero one is 1."""

    def __post_init__(self) -> None:
        _check_rank(self.num_rows, self.rank, self.top_eigenvalue)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows, self.rank)

    def loss(self, x: Tensor) -> Tensor:
        # ||U U^T - M||^2 = ||U^T U||^2 - 2 tr(U^T M U) + ||M||^2 needs no n-by-n product.
        spectrum = _spectrum(self.num_rows, self.rank, self.top_eigenvalue).to(x)
        gram = (x.mT @ x).square().sum((-2, -1))
        fit = (spectrum.unsqueeze(-1) * x.square()).sum((-2, -1))
        return 0.5 * (gram - 2 * fit + spectrum.square().sum())

    def facts(self) -> Facts:
        spectrum = _spectrum(self.num_rows, self.rank, self.top_eigenvalue)
        factor = torch.diag(spectrum.sqrt()).float()[:, : self.rank]
        truncated = tuple(factor * (torch.arange(self.rank) < kept) for kept in range(1, self.rank))
        norm = math.sqrt(2 * self.top_eigenvalue)
        return Facts(
            saddles=(torch.zeros(self.shape), *truncated),
            minima=(factor,),
            minimum_loss=0.0,
            negative_curvature=2 * self.top_eigenvalue,
            smoothness=12 * self.top_eigenvalue,
            hessian_lipschitz=12 * norm,
            radius=norm,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AsymmetricFactorisation(TiltedProblem):
    """`0.5 ||U V^T - M||_F^2 + 1/8 ||U^T U - V^T V||_F^2`; a point is U stacked on V, `[n + m, r]`."""

    num_rows: int = 10
    """n: rows of U."""
    num_columns: int = 8
    """m: rows of V."""
    rank: int = 2
    """r: columns of U and V, and the rank of M."""
    top_eigenvalue: float = 2.0
    """Largest singular value of M, 1 or more; the smallest non-zero one is 1."""

    def __post_init__(self) -> None:
        _check_rank(min(self.num_rows, self.num_columns), self.rank, self.top_eigenvalue)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows + self.num_columns, self.rank)

    def loss(self, x: Tensor) -> Tensor:
        left, right = x[..., : self.num_rows, :], x[..., self.num_rows :, :]
        spectrum = _spectrum(self.rank, self.rank, self.top_eigenvalue).to(x)
        gram_left, gram_right = left.mT @ left, right.mT @ right
        product = (gram_left * gram_right).sum((-2, -1))
        fit = (spectrum.unsqueeze(-1) * left[..., : self.rank, :] * right[..., : self.rank, :]).sum((-2, -1))
        imbalance = (gram_left - gram_right).square().sum((-2, -1))
        return 0.5 * (product - 2 * fit + spectrum.square().sum()) + imbalance / 8

    def facts(self) -> Facts:
        spectrum = _spectrum(self.rank, self.rank, self.top_eigenvalue)
        minimum = torch.zeros(self.shape)
        for start in (0, self.num_rows):
            minimum[start : start + self.rank] = torch.diag(spectrum.sqrt()).float()
        return Facts(
            saddles=(torch.zeros(self.shape),),
            minima=(minimum,),
            minimum_loss=0.0,
            negative_curvature=self.top_eigenvalue,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixSensing(Problem):
    """`1/(2m) sum_i (<A_i, U U^T> - <A_i, M>)^2` symmetric Gaussian A_i, M as in `MatrixFactorisation`."""

    num_rows: int = 6
    """n: rows of U."""
    rank: int = 2
    """r: columns of U, and the rank of M."""
    num_samples: int = 120
    """m: number of measurements; about 5 n r suffice."""
    top_eigenvalue: float = 2.0
    """Largest eigenvalue of M, 1 or more; the smallest non-zero one is 1."""
    seed: int = 0
    """Seed of the measurement matrices."""

    def __post_init__(self) -> None:
        _check_rank(self.num_rows, self.rank, self.top_eigenvalue)
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more; found {self.num_samples}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows, self.rank)

    def loss(self, x: Tensor) -> Tensor:
        return 0.5 * (self._error(x).flatten(-2) @ self._matrices().to(x).flatten(1).T).square().mean(-1)

    def draw(self, num_points: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """Indices of measurements, with replacement: `[num_points, batch_size]`, int64."""
        return torch.randint(self.num_samples, (num_points, batch_size), generator=generator)

    def batch_loss(self, x: Tensor, batch: Tensor) -> Tensor:
        matrices = self._matrices().to(x)[batch].flatten(-2)
        return 0.5 * (matrices @ self._error(x).flatten(-2).unsqueeze(-1)).squeeze(-1).square().mean(-1)

    def facts(self) -> Facts:
        matrices = self._matrices()
        spectrum = _spectrum(self.num_rows, self.rank, self.top_eigenvalue)
        targets = (matrices.diagonal(dim1=-2, dim2=-1) * spectrum).sum(-1)
        slope = 2 * (targets[:, None, None] * matrices).mean(0)
        return Facts(
            saddles=(torch.zeros(self.shape),),
            minima=(torch.diag(spectrum.sqrt()).float()[:, : self.rank],),
            minimum_loss=0.0,
            negative_curvature=float(torch.linalg.eigvalsh(slope)[-1]),
        )

    def _error(self, x: Tensor) -> Tensor:
        return x @ x.mT - torch.diag(_spectrum(self.num_rows, self.rank, self.top_eigenvalue)).to(x)

    def _matrices(self) -> Tensor:
        return _sensing_matrices(self.num_samples, self.num_rows, self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixCompletion(Problem):
    """`1/(2p) sum over seen (i, j) of (U U^T - M)_ij^2`: M is incoherent, each entry is seen with share p."""

    num_rows: int = 12
    """n: rows of U."""
    rank: int = 2
    """r: columns of U, and the rank of M."""
    seen_fraction: float = 0.6
    """p: share of the entries that are seen, 0 < p <= 1."""
    seed: int = 0
    """Seed of M and of the mask."""

    def __post_init__(self) -> None:
        _check_rank(self.num_rows, self.rank, 1.0)
        if not 0 < self.seen_fraction <= 1:
            raise ValueError(f"seen_fraction must lie in (0, 1]; found {self.seen_fraction}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_rows, self.rank)

    def loss(self, x: Tensor) -> Tensor:
        factor, mask = self._data()
        error = (x @ x.mT - (factor @ factor.T).to(x)) * mask.to(x)
        return error.square().sum((-2, -1)) / (2 * self.seen_fraction)

    def draw(self, num_points: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """Flat indices of seen entries, with replacement: `[num_points, batch_size]`, int64."""
        seen = self._data()[1].flatten().nonzero().squeeze(-1)
        return seen[torch.randint(len(seen), (num_points, batch_size), generator=generator)]

    def batch_loss(self, x: Tensor, batch: Tensor) -> Tensor:
        factor, mask = self._data()
        error = (x @ x.mT - (factor @ factor.T).to(x)).flatten(-2).gather(-1, batch)
        return float(mask.sum()) * error.square().mean(-1) / (2 * self.seen_fraction)

    def facts(self) -> Facts:
        factor, mask = self._data()
        seen = 2 * mask * (factor @ factor.T) / self.seen_fraction
        return Facts(
            saddles=(torch.zeros(self.shape),),
            minima=(factor.float(),),
            minimum_loss=0.0,
            negative_curvature=float(torch.linalg.eigvalsh(seen)[-1]),
        )

    def _data(self) -> tuple[Tensor, Tensor]:
        return _completion_data(self.num_rows, self.rank, self.seen_fraction, self.seed)


def _spectrum(num_rows: int, rank: int, top: float) -> Tensor:
    return torch.cat([torch.linspace(top, 1, rank, dtype=torch.float64), torch.zeros(num_rows - rank).double()])


@functools.lru_cache(maxsize=8)
def _sensing_matrices(num_samples: int, num_rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(num_samples, num_rows, num_rows, generator=generator, dtype=torch.float64)
    # Scaled so that E <A, X>^2 = ||X||_F^2 for symmetric X.
    return (matrices + matrices.mT) / 2


@functools.lru_cache(maxsize=8)
def _completion_data(num_rows: int, rank: int, seen_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(num_rows, rank, generator=generator, dtype=torch.float64)
    upper = (torch.rand(num_rows, num_rows, generator=generator, dtype=torch.float64) < seen_fraction).triu()
    return torch.linalg.qr(factor).Q, (upper | upper.T).double()


def _check_rank(num_rows: int, rank: int, top_eigenvalue: float) -> None:
    if not 1 <= rank <= num_rows:
        raise ValueError(f"rank must lie between 1 and the number of rows, {num_rows}; found {rank}.")
    if not top_eigenvalue >= 1:
        raise ValueError(f"top_eigenvalue must be 1 or more; found {top_eigenvalue}.")
