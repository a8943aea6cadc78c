"""One strict saddle at the origin: quadratic (no minimum), quartic (two minima), and an endless valley."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.problems.problem import Facts, TiltedProblem, unit_vector


@dataclass(frozen=True, kw_only=True, slots=True)
class QuadraticSaddle(TiltedProblem):
    """`0.5 x^T H x`, H = diag(-gamma (k times), curvature, ..., curvature): escape only, unbounded below."""

    num_dims: int = 10
    """d: number of coordinates."""
    negative_curvature: float = 0.2
    """gamma: downward curvature along the first `num_negative` coordinates."""
    curvature: float = 1.0
    """Upward curvature along the others."""
    num_negative: int = 1
    """k: number of downward coordinates; the escape time depends on ln(d / k)."""

    def __post_init__(self) -> None:
        _check_positive(self, "num_dims", "negative_curvature", "curvature", "num_negative")
        if self.num_negative > self.num_dims:
            raise ValueError(f"num_negative must not exceed num_dims = {self.num_dims}; found {self.num_negative}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_dims,)

    def escape_coordinate(self, x: Tensor) -> Tensor:
        """Distance from the saddle along the downward coordinates: `[..., d]` to `[...]`."""
        return x[..., : self.num_negative].norm(dim=-1)

    def loss(self, x: Tensor) -> Tensor:
        down = x[..., : self.num_negative]
        whole = self.curvature * x.square().sum(-1)
        return 0.5 * (whole - (self.curvature + self.negative_curvature) * down.square().sum(-1))

    def facts(self) -> Facts:
        return Facts(
            saddles=(torch.zeros(self.num_dims),),
            negative_curvature=self.negative_curvature,
            smoothness=max(self.curvature, self.negative_curvature),
            hessian_lipschitz=0.0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarticSaddle(TiltedProblem):
    """`-gamma/2 a^2 + kappa/4 a^4 + curvature/2 ||y||^2`: a = v.x is the way out, y is the rest of x.

    Minima at `a^2 = gamma / kappa`, y = 0, of loss `-gamma^2 / (4 kappa)`.
    """

    num_dims: int = 10
    """d: number of coordinates."""
    negative_curvature: float = 0.2
    """gamma: downward curvature at the saddle, along v."""
    quartic: float = 0.2
    """kappa: the strength of the term that bounds the loss below."""
    curvature: float = 1.0
    """Upward curvature along every direction other than v."""
    rotation_seed: int | None = None
    """Seed of the random direction v; null is the first axis, which round-off cannot leave.

    A rotated saddle is left by round-off alone; an axis-aligned one flatters diagonal methods such as Adam.
    """

    def __post_init__(self) -> None:
        _check_positive(self, "num_dims", "negative_curvature", "quartic", "curvature")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_dims,)

    def escape_coordinate(self, x: Tensor) -> Tensor:
        """a = v.x, the coordinate along the way out: `[..., d]` to `[...]`."""
        return x[..., 0] if self.rotation_seed is None else x @ self._direction().to(x)

    def loss(self, x: Tensor) -> Tensor:
        a = self.escape_coordinate(x).square()
        whole = self.curvature * x.square().sum(-1)
        return 0.5 * (whole - (self.curvature + self.negative_curvature) * a) + 0.25 * self.quartic * a.square()

    def gradient(self, x: Tensor) -> Tensor:
        # In closed form: escape studies with a million coordinates spend their time here.
        a = self.escape_coordinate(x)
        along = (self.quartic * a.square() - (self.curvature + self.negative_curvature)) * a
        slope = self.curvature * x
        if self.rotation_seed is None:
            slope[..., 0] += along
            return slope
        return slope.add_(along.unsqueeze(-1) * self._direction().to(x))

    def facts(self) -> Facts:
        distance = math.sqrt(self.negative_curvature / self.quartic)
        radius = 1.5 * distance
        minimum = distance * self._direction()
        return Facts(
            saddles=(torch.zeros(self.num_dims),),
            minima=(minimum.float(), -minimum.float()),
            minimum_loss=-(self.negative_curvature**2) / (4 * self.quartic),
            negative_curvature=self.negative_curvature,
            smoothness=max(self.curvature, 3 * self.quartic * radius**2 - self.negative_curvature),
            hessian_lipschitz=6 * self.quartic * radius,
            radius=radius,
        )

    def _direction(self) -> Tensor:
        return _direction(self.num_dims, self.rotation_seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValleySaddle(TiltedProblem):
    """`gamma / tail * (1 + a^2)^(-tail/2) + curvature/2 ||y||^2`, a = x_1: a saddle, then an endless valley.

    Far out the gradient falls as `gamma a^-(tail + 1)`: gradient descent with a fixed step reaches gradient
    eps in about `eps^-p` steps, `p = (tail + 2) / (tail + 1)`, and with a step of order eps^2, which noise
    at a constant batch asks for, in `eps^-(2 + p)`: near the worst case eps^-4 for a small tail. There is no
    minimum: the infimum, 0, is at infinity.
    """

    num_dims: int = 10
    """d: number of coordinates."""
    negative_curvature: float = 1.0
    """gamma: downward curvature at the saddle."""
    tail: float = 1.0
    """How fast the valley flattens: the loss falls as `a^-tail`."""
    curvature: float = 1.0
    """Upward curvature across the valley."""

    def __post_init__(self) -> None:
        _check_positive(self, "num_dims", "negative_curvature", "tail", "curvature")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_dims,)

    def escape_coordinate(self, x: Tensor) -> Tensor:
        """a = x_1: `[..., d]` to `[...]`."""
        return x[..., 0]

    def loss(self, x: Tensor) -> Tensor:
        a = x[..., 0].square()
        across = 0.5 * self.curvature * (x.square().sum(-1) - a)
        return self.negative_curvature / self.tail * (1 + a).pow(-0.5 * self.tail) + across

    def facts(self) -> Facts:
        return Facts(
            saddles=(torch.zeros(self.num_dims),),
            minimum_loss=0.0,
            negative_curvature=self.negative_curvature,
            smoothness=max(self.curvature, self.negative_curvature),
            hessian_lipschitz=self.negative_curvature * _valley_third_derivative(self.tail),
        )


def _valley_third_derivative(tail: float) -> float:
    # u = 1 + a^2, q = tail: the slope is -a u^-(q/2+1), derived twice (q+2) a u^-(q/2+3) (3u - (q+4) a^2).
    a = torch.linspace(0, 10, 100_001, dtype=torch.float64)
    u = 1 + a.square()
    third = (tail + 2) * a * u.pow(-0.5 * tail - 3) * (3 * u - (tail + 4) * a.square())
    return float(third.abs().max())


@functools.lru_cache(maxsize=16)
def _direction(num_dims: int, seed: int | None) -> Tensor:
    if seed is not None:
        return unit_vector(num_dims, seed)
    axis = torch.zeros(num_dims, dtype=torch.float64)
    axis[0] = 1.0
    return axis


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ValueError(f"{name} must be above 0; found {value}.")
