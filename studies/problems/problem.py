"""What every test problem offers: a pure loss, its mini-batch twin, and the facts that are known about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known about a problem without running anything; None or empty where it is not known."""

    saddles: tuple[Tensor, ...] = ()
    """Stationary points that are not minima, `[*shape]` each, one of each kind; start at the first."""
    minima: tuple[Tensor, ...] = ()
    """Local minima `[*shape]`, one for each kind."""
    minimum_loss: float | None = None
    """The lowest loss; None when it is unknown or the loss is unbounded below."""
    negative_curvature: float | None = None
    """gamma: minus the smallest Hessian eigenvalue at `saddles[0]`; 0 at a saddle that is not strict."""
    smoothness: float | None = None
    """L: the largest Hessian eigenvalue in size within `radius`."""
    hessian_lipschitz: float | None = None
    """rho: the Lipschitz constant of the Hessian within `radius`."""
    radius: float = math.inf
    """Norm of the points for which `smoothness` and `hessian_lipschitz` hold."""


class Problem:
    """A function to minimise, over points of one `shape`, with any number of points side by side.

    Every loss takes points `[..., *shape]` and returns one loss a point `[...]`, so that many seeds are one
    tensor.
    """

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one point."""
        raise NotImplementedError

    def loss(self, x: Tensor) -> Tensor:
        """The exact loss of every point: `[..., *shape]` to `[...]`, in the dtype of `x`."""
        raise NotImplementedError

    def gradient(self, x: Tensor) -> Tensor:
        """The exact gradient of every point: `[..., *shape]` to the same."""
        return _gradient(self.loss, x)

    def facts(self) -> Facts:
        """What is known about the problem."""
        raise NotImplementedError

    def draw(self, num_points: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """A mini-batch for each of `num_points` points, to be handed to `batch_loss`."""
        raise NotImplementedError

    def batch_loss(self, x: Tensor, batch: Tensor) -> Tensor:
        """The loss on a mini-batch, `[num_points, *shape]` to `[num_points]`; its mean is `loss`."""
        raise NotImplementedError

    def batch_gradient(self, x: Tensor, batch: Tensor) -> Tensor:
        """The gradient of `batch_loss`: `[num_points, *shape]` to the same."""
        return _gradient(lambda leaf: self.batch_loss(leaf, batch), x)

    def project(self, x: Tensor) -> Tensor:
        """The nearest feasible point, which is `x` itself unless the problem lives on a sphere."""
        return x

    @property
    def num_scalars(self) -> int:
        """Number of scalars of one point: d."""
        return math.prod(self.shape)

    @property
    def event_dims(self) -> tuple[int, ...]:
        """The trailing dimensions that make up one point."""
        return tuple(range(-len(self.shape), 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class TiltedProblem(Problem):
    """A problem without data: a sample tilts the loss, `f(x) + sigma <z, x> / sqrt(d)`, z ~ N(0, I).

    The gradient noise of one sample then has energy `sigma^2` in any dimension, and a batch of b has `sigma^2
    / b`.
    """

    gradient_noise: float = 1.0
    """sigma: root mean square norm of one sample's gradient noise, over all coordinates together."""

    def draw(self, num_points: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """The mean tilt of a batch, drawn at once: `[num_points, *shape]`, float32."""
        scale = self.gradient_noise / math.sqrt(batch_size * self.num_scalars)
        return torch.randn(num_points, *self.shape, generator=generator).mul_(scale)

    def batch_loss(self, x: Tensor, batch: Tensor) -> Tensor:
        """The tilted loss of every point."""
        return self.loss(x) + (x * batch.to(x.dtype)).sum(self.event_dims)

    def batch_gradient(self, x: Tensor, batch: Tensor) -> Tensor:
        """The exact gradient plus the tilt, without a graph for the tilt."""
        return self.gradient(x).add_(batch)


def unit_vector(num_scalars: int, seed: int) -> Tensor:
    """A unit vector `[num_scalars]` in a uniformly random direction, float64."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(num_scalars, generator=generator, dtype=torch.float64)
    return direction / direction.norm()


def _gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return slope
