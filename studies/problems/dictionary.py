"""Dictionary learning on the sphere: one atom of an orthogonal dictionary from sparse mixtures."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.problems.problem import Facts, Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class DictionaryLearning(Problem):
    """`1/p sum_i mu log cosh(q.y_i / mu)` over unit q: a smooth l1 norm that is least where q is one atom.

    The dictionary is the identity, so that atoms are axes, and `y_i` are Bernoulli-Gaussian codes. The loss
    reads q divided by its norm; `project` renormalises. Minima are near the axes, how near depends on p:
    facts about them are not exact.

    Source: Sun, Qu, Wright 2015, arXiv:1504.06785, the objective. Differs: the complete dictionary is the
    identity, which an orthogonal change of variables always reaches.
    """

    num_dims: int = 10
    """d: number of coordinates and of atoms, 2 or more."""
    num_samples: int = 1000
    """p: number of mixtures."""
    active_fraction: float = 0.2
    """Share of the codes that are not zero, 0 < x < 0.5."""
    smoothing: float = 0.1
    """mu: width of the smooth bottom of log cosh."""
    seed: int = 0
    """Seed of the codes."""

    def __post_init__(self) -> None:
        if self.num_dims < 2 or self.num_samples < 1:
            raise ValueError(f"num_dims >= 2, num_samples >= 1; found {self.num_dims} and {self.num_samples}.")
        if not 0 < self.active_fraction < 0.5 or not self.smoothing > 0:
            raise ValueError(
                f"active_fraction in (0, 0.5), smoothing > 0; found {self.active_fraction}, {self.smoothing}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_dims,)

    def loss(self, x: Tensor) -> Tensor:
        codes = _codes(self.num_samples, self.num_dims, self.active_fraction, self.seed).to(x)
        return self._log_cosh(self.project(x) @ codes.T).mean(-1)

    def draw(self, num_points: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """Indices of mixtures, with replacement: `[num_points, batch_size]`, int64."""
        return torch.randint(self.num_samples, (num_points, batch_size), generator=generator)

    def batch_loss(self, x: Tensor, batch: Tensor) -> Tensor:
        codes = _codes(self.num_samples, self.num_dims, self.active_fraction, self.seed).to(x)[batch]
        return self._log_cosh((codes @ self.project(x).unsqueeze(-1)).squeeze(-1)).mean(-1)

    def project(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def facts(self) -> Facts:
        return Facts()

    def _log_cosh(self, products: Tensor) -> Tensor:
        # log cosh u = softplus(2u) - u - log 2, which does not overflow.
        scaled = products / self.smoothing
        return self.smoothing * (torch.nn.functional.softplus(2 * scaled) - scaled - torch.log(scaled.new_tensor(2.0)))


@functools.lru_cache(maxsize=8)
def _codes(num_samples: int, num_dims: int, active_fraction: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_samples, num_dims, generator=generator, dtype=torch.float64)
    active = torch.rand(num_samples, num_dims, generator=generator, dtype=torch.float64) < active_fraction
    return values * active
