"""The layer problem: a linear layer's weight W and the second moments H of its inputs.

All solvers minimise the same error, tr((B - W) H (B - W)'), over another set of weights B each: sparse ones, ones on a
grid, ones without some inputs. What they need of H beyond the matrix itself (factorisations) is computed once and kept
with the moments, since the layers that share an input share their moments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from limbeck.errors import CompressionError

DAMPING = 0.01
"""Share of H's mean diagonal that is added to its diagonal (GPTQ, OSSCAR and ALPS use the same)."""
PRUNED_FROM = 0.05
"""Share of zeros from which a layer counts as pruned: its zeros stay."""
_PANEL = 192
"""Columns of a triangular matrix that are computed together; products of this width run at full speed."""
_TOGETHER = 32
"""Inputs whose places are settled at once; the sum of their pivots is within 0.1 % of that of one at a time."""


@dataclass(eq=False)
class Moments:
    """Second moments of the inputs of one or more linear layers."""

    gram: Tensor
    """float32 [I I], the sum of x x' over the tokens, divided by their number."""
    absolute_mean: Tensor
    """float32 [I], mean of |x| (AWQ)."""
    absolute_max: Tensor
    """float32 [I], largest |x| (SmoothQuant)."""
    tokens: int
    """How many inputs were seen; 0 leaves the moments at zero."""
    _kept: dict[tuple[str, float], tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, inputs: Tensor) -> Moments:
        """Moments of inputs [n I]."""
        inputs = inputs.float()
        count = max(len(inputs), 1)
        absolute = inputs.abs()
        largest = absolute.amax(0) if len(inputs) else absolute.new_zeros(inputs.shape[1])
        return cls(_gram(inputs).div_(count), absolute.sum(0) / count, largest, len(inputs))

    def to(self, device: torch.device) -> Moments:
        """The same on a device."""
        gram, mean, largest = (x.to(device) for x in (self.gram, self.absolute_mean, self.absolute_max))
        return Moments(gram, mean, largest, self.tokens)

    def scaled(self, factors: Tensor) -> Moments:
        """Moments of the inputs x * factors; factors [I] > 0."""
        return Moments(
            self.gram * factors[:, None] * factors,
            self.absolute_mean * factors,
            self.absolute_max * factors,
            self.tokens,
        )

    def damped(self, damping: float = DAMPING) -> Tensor:
        """H + damping * mean(diag H) * I, float32 [I I]; the identity where nothing was seen or all inputs are 0.

        With the identity every solver falls back to what it does without data: rounding to nearest, magnitude pruning.
        """
        diagonal = self.gram.diagonal()
        mean = diagonal.mean()
        if not bool(mean > 0):
            return torch.eye(len(self.gram), device=self.gram.device)
        # Positive even for damping 0, so that an input that is always zero does not make H singular.
        return self.gram + torch.diag_embed((mean * max(damping, 1e-6)).expand_as(diagonal))

    def inverse(self, damping: float = DAMPING) -> Tensor:
        """(H + damping)^-1, float32 [I I]; computed once, in float64."""
        return self._once("inverse", damping)[0]

    def inverse_factor(self, damping: float = DAMPING) -> Tensor:
        """Upper Cholesky factor U of the inverse, U'U = (H + damping)^-1, float32 [I I]; computed once, in float64."""
        return self._once("inverse_factor", damping)[0]

    def ordered_factor(self, damping: float = DAMPING, ordered: bool = True) -> tuple[Tensor, Tensor]:
        """An order of the inputs, int64 [I], and the `inverse_factor` U of the moments in that order.

        1 / U_jj^2 is the part of input j's mean square that the inputs after it do not explain. Their product is
        det H in any order; here their sum is small, because the last places go to the inputs that leave least.

        Args:
          ordered: False leaves the inputs as they stand.
        Source: the order of smallest pivots, as in sorted QR for lattice decoding.
        """
        if not ordered:
            return torch.arange(len(self.gram), device=self.gram.device), self.inverse_factor(damping)
        if ("order", damping) not in self._kept:
            self._kept["order", damping] = (_smallest_pivots_last(self.damped(damping)),)
        (order,) = self._kept["order", damping]
        if ("ordered_factor", damping) not in self._kept:
            damped = _picked(self.damped(damping), order).double()
            self._kept["ordered_factor", damping] = tuple(part.float() for part in _inverse_factor(damped))
        return order, self._kept["ordered_factor", damping][0]

    def _once(self, name: str, damping: float) -> tuple[Tensor, ...]:
        if (name, damping) not in self._kept:
            damped = self.damped(damping).double()
            self._kept[name, damping] = tuple(part.float() for part in _COMPUTED[name](damped))
        return self._kept[name, damping]


def _gram(inputs: Tensor) -> Tensor:
    """x'x [I I] of [n I], a panel of columns at a time: what lies below the diagonal is copied, not computed."""
    size = inputs.shape[1]
    gram = inputs.new_empty(size, size)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        gram[start:stop, start:] = inputs[:, start:stop].T @ inputs[:, start:]
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def _inverse(damped: Tensor) -> tuple[Tensor, ...]:
    return (torch.cholesky_inverse(torch.linalg.cholesky(damped)),)


def _inverse_factor(damped: Tensor) -> tuple[Tensor, ...]:
    """With all inputs in reverse order H = L L'; turned back, L^-1 is the upper factor of H^-1."""
    return (_inverse_of_lower(torch.linalg.cholesky(damped.flip(0, 1))).flip(0, 1),)


def _inverse_of_lower(factor: Tensor) -> Tensor:
    """Inverse of a lower triangle by halves, so that its zeros cost nothing and most of it are products."""
    size = len(factor)
    if size <= _PANEL:
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, identity, upper=False)
    half = size // 2
    first, last = _inverse_of_lower(factor[:half, :half]), _inverse_of_lower(factor[half:, half:])
    inverse = torch.zeros_like(factor)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -(last @ (factor[half:, :half] @ first))
    return inverse


def _picked(matrix: Tensor, places: Tensor) -> Tensor:
    """Rows and columns of a matrix; twice as fast as by indices."""
    return matrix.index_select(0, places).index_select(1, places)


def _smallest_pivots_last(damped: Tensor) -> Tensor:
    """Order [I] of a Cholesky factorisation that takes the smallest pivots first, _TOGETHER at a time, reversed."""
    rest, places, order = damped, torch.arange(len(damped), device=damped.device), []
    while len(rest):
        ranked = rest.diagonal().argsort()
        taken, kept = ranked[:_TOGETHER], ranked[_TOGETHER:].sort().values
        order.append(places[taken])
        rows = rest.index_select(0, taken)
        factor, failed = torch.linalg.cholesky_ex(rows.index_select(1, taken))
        if bool(failed):  # nothing but rounding errors is left: the ranks so far are as good as any
            order.append(places[ranked[_TOGETHER:]])
            break
        columns = torch.linalg.solve_triangular(factor, rows.index_select(1, kept), upper=False)
        rest, places = _picked(rest, kept).addmm_(columns.T, columns, alpha=-1), places[kept]
    return torch.cat(order).flip(0)


_COMPUTED = {"inverse": _inverse, "inverse_factor": _inverse_factor}


@dataclass(eq=False)
class LayerProblem:
    """A linear layer to approximate: y = W x over inputs with the given moments."""

    weight: Tensor
    """float32 [O I]; the target, all of it finite."""
    moments: Moments
    name: str = "layer"
    """For messages."""
    mask: Tensor | None = None
    """bool [O I]; False marks weights that are zero and must stay zero. None: all are free."""

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.weight).all()):
            raise CompressionError(f"{self.name}: the weight holds NaN or infinity; the checkpoint is damaged.")
        if not bool(torch.isfinite(self.moments.gram).all()):
            raise CompressionError(
                f"{self.name}: the inputs seen in calibration hold NaN or infinity; load the model in float32 or check "
                "the layers before."
            )
        if self.weight.shape[1] != len(self.moments.gram):
            raise CompressionError(
                f"{self.name}: weight {list(self.weight.shape)} and moments of {len(self.moments.gram)} inputs do not "
                "belong together."
            )


def layer_error(problem: LayerProblem, weight: Tensor) -> float:
    """Relative error of the layer's outputs: tr((B - W) H (B - W)') / tr(W H W'), H without damping.

    Args:
      problem: the layer.
      weight: B, float [O I].
    Returns: 0 for the layer itself, 1 for outputs of zero; plain squared differences where no input was seen.
    """
    gram = problem.moments.gram if bool(problem.moments.gram.diagonal().any()) else problem.moments.damped()
    difference = weight.float() - problem.weight
    scale, error = _quadratic(problem.weight, gram), _quadratic(difference, gram)
    return error / scale if scale > 0 else error


def _quadratic(weight: Tensor, gram: Tensor) -> float:
    """tr(W H W') from the lower triangle of H; float64 sums of float32 products."""
    total = 0.0
    for start in range(0, len(gram), _PANEL):
        stop = start + _PANEL
        panel = weight[:, start:stop]
        product = panel @ gram[start:stop, start:stop]
        product.addmm_(weight[:, stop:], gram[stop:, start:stop], alpha=2)
        total += float(product.mul_(panel).sum(dtype=torch.float64))
    return total


def retarget(problem: LayerProblem, cross: Tensor, damping: float = DAMPING) -> LayerProblem:
    """The problem whose target is the dense model's output on its own inputs, as one of the ordinary kind.

    With inputs x of the compressed model, inputs z of the dense one and C = E[z x'], the error E|B x - W z|^2 is
    E|(B - W C H^-1) x|^2 plus a constant: the same problem for another weight. H is damped, and C with it, so that
    without difference between x and z the weight stays W. Masked weights stay masked.

    Args:
      problem: moments of x, weight W.
      cross: float32 [I I], E[z x'].
    Source: the full sequential mode of OSSCAR (2403.12983).
    """
    ridge = problem.moments.damped(damping) - problem.moments.gram
    target = problem.weight @ (cross + ridge) @ problem.moments.inverse(damping)
    return LayerProblem(target, problem.moments, problem.name, problem.mask)
