"""The octopus of Du et al. 2017: d saddles in a row, each exponentially harder for plain gradient descent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.problems.problem import Facts, TiltedProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class Octopus(TiltedProblem):
    """Coordinates settle at `4 tau` one after the other; the first with |x_i| < 2 tau says which piece holds.

    With every coordinate reflected to |x| and i - 1 of them settled (|x_j| >= 2 tau):

    - |x_i| <= tau: `sum_{j<i} L (x_j - 4 tau)^2 - gamma x_i^2 + sum_{j>i} L x_j^2 - (i - 1) nu`
    - tau < |x_i| < 2 tau: the same with `-gamma x_i^2 + L x_{i+1}^2` replaced by
      `g1(x_i) + g2(x_i) x_{i+1}^2` (by `g1(x_i)` alone for the last coordinate)
    - all settled: `sum_j L (x_j - 4 tau)^2 - d nu`

    The loss has a continuous gradient where every coordinate after the i-th is below tau; elsewhere the first
    piece that fits is used.

    Source: Du, Jin, Lee, Jordan, Singh, Poczos 2017, arXiv:1705.10412.
    """

    num_dims: int = 5
    """d: number of coordinates, and of saddles on the way."""
    upward: float = math.e
    """L: half the upward curvature."""
    downward: float = 1.0
    """gamma: half the downward curvature at each saddle."""
    tau: float = math.e
    """Length of one piece; a settled coordinate rests at 4 tau."""

    def __post_init__(self) -> None:
        for name in ("num_dims", "upward", "downward", "tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; found {getattr(self, name)}.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_dims,)

    @property
    def drop(self) -> float:
        """nu: how much the loss falls from one saddle to the next, `-g1(2 tau) + 4 L tau^2`."""
        return (13 * (self.upward + self.downward) / 6 + 4 * self.upward) * self.tau**2

    def loss(self, x: Tensor) -> Tensor:
        size = x.detach().abs()
        settled = (size >= 2 * self.tau).to(x.dtype).cumprod(-1)
        num_settled = settled.sum(-1)
        before = (settled * (x.abs() - 4 * self.tau).square()).sum(-1) * self.upward - num_settled * self.drop
        index = num_settled.long().unsqueeze(-1)
        padded = torch.cat([x, torch.zeros_like(x[..., :2])], -1)
        here, after = (padded.gather(-1, index + step).squeeze(-1) for step in (0, 1))
        rest = ((1 - settled) * x.square()).sum(-1) - here.square()
        near = -self.downward * here.square() + self.upward * rest
        t = here.abs()
        far = self._g1(t) + self._g2(t) * after.square() + self.upward * (rest - after.square())
        piece = torch.where(t.detach() <= self.tau, near, far)
        return before + torch.where(num_settled < self.num_dims, piece, torch.zeros_like(piece))

    def gradient(self, x: Tensor) -> Tensor:
        # In closed form: races take thousands of steps, and autograd through the pieces is ten times slower.
        settled = (x.abs() >= 2 * self.tau).to(x.dtype).cumprod(-1)
        index = settled.sum(-1, keepdim=True).long()
        padded = torch.cat([x, torch.zeros_like(x[..., :2])], -1)
        here, after = padded.gather(-1, index), padded.gather(-1, index + 1)
        t = here.abs()
        is_near = t <= self.tau
        slope = torch.sign(here) * (self._g1_slope(t) + self._g2_slope(t) * after.square())
        slopes = torch.cat([2 * self.upward * (x - 4 * self.tau * settled * torch.sign(x)), padded[..., -2:]], -1)
        slopes.scatter_(-1, index, torch.where(is_near, -2 * self.downward * here, slope))
        slopes.scatter_(-1, index + 1, 2 * torch.where(is_near, self.upward * after, self._g2(t) * after))
        return slopes[..., : self.num_dims]

    def settled(self, x: Tensor) -> Tensor:
        """How many coordinates have settled, counted from the first: `[..., d]` to `[...]`, int64."""
        return (x.abs() >= 2 * self.tau).long().cumprod(-1).sum(-1)

    def facts(self) -> Facts:
        saddle, minimum = torch.zeros(self.num_dims), torch.full((self.num_dims,), 4 * self.tau)
        steps = torch.arange(self.num_dims)
        others = tuple(torch.where(steps < k, minimum, saddle) for k in range(1, self.num_dims))
        return Facts(
            saddles=(saddle, *others),
            minima=(minimum,),
            minimum_loss=-self.num_dims * self.drop,
            negative_curvature=2 * self.downward,
        )

    def _g1(self, t: Tensor) -> Tensor:
        gamma, upward, tau = self.downward, self.upward, self.tau
        u = t - tau
        cubic, quartic = (10 * gamma - 14 * upward) / (3 * tau), (5 * upward - 3 * gamma) / (2 * tau**2)
        return -gamma * t.square() + cubic * u**3 + quartic * u**4

    def _g1_slope(self, t: Tensor) -> Tensor:
        gamma, upward, tau = self.downward, self.upward, self.tau
        u = t - tau
        cubic, quartic = (10 * gamma - 14 * upward) / (3 * tau), (5 * upward - 3 * gamma) / (2 * tau**2)
        return -2 * gamma * t + 3 * cubic * u.square() + 4 * quartic * u**3

    def _g2_slope(self, t: Tensor) -> Tensor:
        u = (t - 2 * self.tau) / self.tau
        return -(self.upward + self.downward) / self.tau * (30 * u.square() + 60 * u**3 + 30 * u**4)

    def _g2(self, t: Tensor) -> Tensor:
        u = (t - 2 * self.tau) / self.tau
        return -self.downward - (self.upward + self.downward) * (10 * u**3 + 15 * u**4 + 6 * u**5)
