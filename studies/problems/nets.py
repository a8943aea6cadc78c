"""Small networks that start at, or near, a saddle. A point is the flat vector of all weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from studies.problems.problem import Facts, Problem

Kind = Literal["linear", "tanh", "autoencoder", "bottleneck"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallNet(Problem):
    """A two-layer network `W2 act(W1 x)` on a fixed synthetic data set of `num_samples` rows.

    | kind | network and loss | known saddle |
    |---|---|---|
    | `linear` | linear regression through W2 W1, squared error | zero: saddle-to-saddle plateaus follow |
    | `tanh` | tanh regression, squared error | hidden units that are all alike stay alike; zero |
    | `autoencoder` | tanh encoder, inputs as targets | zero |
    | `bottleneck` | softmax regression through W2 W1 | zero, exactly zero gradient |

    At zero the gradient vanishes exactly and the smallest Hessian eigenvalue is minus the largest singular
    value of the gradient with respect to the product W2 W1, because every activation has slope 1 at 0.
    """

    kind: Kind = "linear"
    """Which of the four networks."""
    num_inputs: int = 6
    """Number of input features."""
    num_hidden: int = 4
    """Number of hidden units."""
    num_outputs: int = 3
    """Number of outputs or classes; an autoencoder has as many as it has inputs."""
    num_samples: int = 256
    """Rows of the data set."""
    seed: int = 0
    """Seed of the data set."""

    def __post_init__(self) -> None:
        if min(self.num_inputs, self.num_hidden, self.num_outputs, self.num_samples) < 1:
            raise ValueError("num_inputs, num_hidden, num_outputs and num_samples must be 1 or more each.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_hidden * (self.num_inputs + self._num_targets()),)

    def loss(self, x: Tensor) -> Tensor:
        inputs, targets = self._data()
        return self._error(self._outputs(x, inputs.to(x)), targets.to(x))

    def draw(self, num_points: int, batch_size: int, generator: torch.Generator) -> Tensor:
        """Indices of rows, with replacement: `[num_points, batch_size]`, int64."""
        return torch.randint(self.num_samples, (num_points, batch_size), generator=generator)

    def batch_loss(self, x: Tensor, batch: Tensor) -> Tensor:
        inputs, targets = self._data()
        return self._error(self._outputs(x, inputs.to(x)[batch]), targets.to(x)[batch])

    def facts(self) -> Facts:
        inputs, targets = self._data()
        zero = torch.zeros(len(inputs), self._num_targets(), dtype=inputs.dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(self._error(zero, targets), zero)
        return Facts(
            saddles=(torch.zeros(self.shape),),
            negative_curvature=float(torch.linalg.matrix_norm(slope.T @ inputs, ord=2)),
        )

    def alike_units(self, scale: float) -> Tensor:
        """Weights `[*shape]` with hidden units all alike; gradients keep them so, only noise parts them."""
        first = torch.full((self.num_hidden, self.num_inputs), scale)
        second = torch.full((self._num_targets(), self.num_hidden), scale)
        return torch.cat([first.flatten(), second.flatten()])

    def _outputs(self, x: Tensor, inputs: Tensor) -> Tensor:
        split = self.num_hidden * self.num_inputs
        first = x[..., :split].unflatten(-1, (self.num_hidden, self.num_inputs))
        second = x[..., split:].unflatten(-1, (self._num_targets(), self.num_hidden))
        hidden = inputs @ first.mT
        if self.kind in ("tanh", "autoencoder"):
            hidden = torch.tanh(hidden)
        return hidden @ second.mT

    def _error(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.kind == "bottleneck":
            return -(torch.log_softmax(outputs, -1) * targets).sum(-1).mean(-1)
        return 0.5 * (outputs - targets).square().sum(-1).mean(-1)

    def _num_targets(self) -> int:
        return self.num_inputs if self.kind == "autoencoder" else self.num_outputs

    def _data(self) -> tuple[Tensor, Tensor]:
        return _data(self.kind, self.num_inputs, self._num_targets(), self.num_samples, self.seed)


@functools.lru_cache(maxsize=8)
def _data(kind: Kind, num_inputs: int, num_targets: int, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, num_inputs, generator=generator, dtype=torch.float64)
    if kind == "autoencoder":
        inputs = inputs * torch.linspace(1, 0.2, num_inputs, dtype=torch.float64)
        return inputs, inputs
    # Singular values a factor of two apart make one plateau after the other.
    mixing = torch.linalg.qr(torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.float64)).Q
    strengths = 2.0 ** -torch.arange(min(num_inputs, num_targets), dtype=torch.float64)
    targets = torch.zeros(num_samples, num_targets, dtype=torch.float64)
    targets[:, : len(strengths)] = 2 * strengths * (inputs @ mixing)[:, : len(strengths)]
    if kind == "bottleneck":
        return inputs, torch.nn.functional.one_hot(targets.argmax(-1), num_targets).double()
    return inputs, targets
