"""A kept set of inputs, and what every removal from it and every addition to it would change.

With S the kept and R the removed inputs, and H scaled to a unit diagonal, this is kept up to date:

    Q = [ -M      X'  ]    M = (H_SS)^-1              Z = [ B_S' ]    B_S' = W_S' + X' W_R'    the refit weight
        [  X      C   ]    X = H_RS M                     [ C W_R' ]
                           C = H_RR - H_RS M H_SR     G = Z Z'

Removing group g from S adds tr(M_gg^-1 G_gg) to the squared error; adding g from R takes tr(C_gg^-1 G_gg) off. Either
is a sweep with the pivot Q_gg = s P, P = K K', s = -1 for a removal and 1 for an addition. It changes Q and Z by
products whose rank is the size of the group, with l = Q_:g K^-T outside of g and l_g = s (K - K^-T):

    Q <- Q - s l l'        Z <- Z - s l K^-1 Z_g        then Q_gg = -s P^-1

Only G is stored. Sweeps wait in a panel, and a column that is needed meanwhile is put together from it; the large
matrices are touched once a panel, by one product.

Source: Goodnight, A tutorial on the SWEEP operator (1979).
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.compress.problem import LayerProblem

_PANEL = 64
"""Columns that wait for one product."""
_LEAST_DAMPING = 1e-3
"""Below this the inverse of H is too large for sweeps in float32."""


class Sweep:
    """The state above for groups of consecutive inputs, at first all of them kept."""

    def __init__(self, problem: LayerProblem, group_size: int, damping: float, exchange: int = 0) -> None:
        """`exchange`: groups that are removed and added between `mark` and `back_to_mark`."""
        weight, inputs = problem.weight, problem.weight.shape[1]
        self._problem, self._damping, self._size = problem, damping, group_size
        self._dtype = torch.float32 if damping >= _LEAST_DAMPING else torch.float64
        self.kept = torch.ones(inputs // group_size, dtype=torch.bool, device=weight.device)
        self.count = len(self.kept)
        panel = max(_PANEL, group_size, 2 * exchange * group_size)
        self._left, self._signed, self._right = (weight.new_empty(panel, inputs, dtype=self._dtype) for _ in range(3))
        self._waiting = self._started = 0
        self._swept = self._products = self._pivots = self._energies = weight.new_empty(0)
        self._signs = -weight.new_ones(self.count, 1, 1, dtype=self._dtype)
        self._start()
        self.mark()

    def inputs(self) -> Tensor:
        """The kept inputs, bool [I]."""
        return self.kept.repeat_interleave(self._size)

    def remove_cheapest(self) -> float:
        """Remove the kept group that costs least; returns the squared error that this adds."""
        cost, group = self._scores().masked_fill(~self.kept, float("inf")).min(0)
        self._sweep(int(group), -1.0)
        return float(cost)

    def add_best(self) -> float:
        """Take back the removed group that helps most; returns the squared error that this takes off."""
        gain, group = self._scores().masked_fill(self.kept, -1.0).max(0)
        self._sweep(int(group), 1.0)
        return float(gain)

    def mark(self) -> None:
        """Remember this state; holds for as many sweeps as `exchange` says."""
        self._apply()
        state = (self.kept, self._signs, self._pivots, self._energies)
        self._marked = (self.count, [part.clone() for part in state])

    def back_to_mark(self) -> None:
        """Undo all sweeps since `mark`, exactly."""
        self.count, (self.kept, self._signs, self._pivots, self._energies) = self._marked
        self._waiting = 0

    def _start(self) -> None:
        """Everything from H itself: at first, and again when half of the inputs are gone, against drift in float32."""
        gram, kept = self._problem.moments.damped(self._damping), self.inputs()
        scale = gram.diagonal().sqrt()
        weight = self._problem.weight.T * scale[:, None]
        seen = self._problem.moments.gram.diagonal() > 0
        if bool(seen.any()):
            # Damping alone would make an input that is always zero worth more than one that is small.
            weight = weight * seen[:, None]
        if self.count == len(self.kept) and self._dtype == torch.float32:
            self._swept = -self._problem.moments.inverse(self._damping) * scale[:, None] * scale
            self._products = weight @ weight.T
        else:
            gram = gram.to(self._dtype) / scale[:, None] / scale
            self._swept, refit = _state(gram, weight.to(self._dtype), kept)
            self._products = refit @ refit.T
        self._pivots = _blocks(self._swept, self._size) * self._signs
        self._energies = _blocks(self._products, self._size).clone()
        self._waiting, self._started = 0, self.count

    def _scores(self) -> Tensor:
        """tr(P^-1 G_gg) of every group, [n]."""
        if self._size == 1:
            return (self._energies / self._pivots)[:, 0, 0]
        # Not `solve`: torch hands the LUs of a batch to several threads, and MKL's LU is not safe there (pytorch issue
        # 142815: wrong from 160 rows on, or an error). The blocks are positive definite, so Cholesky does.
        factors = torch.linalg.cholesky(self._pivots)
        return torch.cholesky_solve(self._energies, factors).diagonal(dim1=1, dim2=2).sum(1)

    def _sweep(self, group: int, sign: float) -> None:
        if self._waiting + self._size > len(self._left):
            self._apply()
        here = slice(group * self._size, (group + 1) * self._size)
        factor, inverse = _factor(self._pivots[group])
        column, product = self._columns(here)
        column[:, here] = sign * self._pivots[group]
        product[:, here] = self._energies[group]
        # Rows here are the columns of the formulas: left is l', and half of its product with K^-1 G_gg K^-T is taken
        # off `right` so that G changes by the symmetric l e' + e l'.
        left, right = inverse @ column, sign * inverse @ product
        inner = sign * right[:, here] @ inverse.T
        left[:, here] = sign * (factor.T - inverse)
        right -= 0.5 * inner @ left
        self._update_blocks(left, right, sign)
        self._pivots[group] = inverse.T @ inverse
        self._energies[group] = inverse.T @ inner @ inverse
        panel = slice(self._waiting, self._waiting + self._size)
        self._left[panel], self._signed[panel], self._right[panel] = left, sign * left, right
        self._waiting = panel.stop
        self.kept[group] = sign > 0
        self._signs[group] = -sign
        self.count += int(sign)

    def _columns(self, here: slice) -> tuple[Tensor, Tensor]:
        """Rows `here` of Q and of G, [g I] each, as they are after all sweeps."""
        left, signed, right = (part[: self._waiting] for part in (self._left, self._signed, self._right))
        column = torch.addmm(self._swept[here], signed[:, here].T, left, alpha=-1)
        product = torch.addmm(self._products[here], right[:, here].T, left, alpha=-1)
        return column, product.addmm_(left[:, here].T, right, alpha=-1)

    def _update_blocks(self, left: Tensor, right: Tensor, sign: float) -> None:
        """Take one sweep into the diagonal blocks, which the scores need at once."""
        left, right = (part.unflatten(1, (-1, self._size)).permute(1, 2, 0) for part in (left, right))
        self._pivots -= sign * self._signs * (left @ left.mT)
        cross = left @ right.mT
        self._energies -= cross + cross.mT

    def _apply(self) -> None:
        """The waiting sweeps into the large matrices."""
        if self.count * 2 <= self._started:
            self._start()
            return
        left, signed, right = (part[: self._waiting] for part in (self._left, self._signed, self._right))
        self._swept.addmm_(signed.T, left, alpha=-1)
        self._products.addmm_(left.T, right, alpha=-1).addmm_(right.T, left, alpha=-1)
        _blocks(self._swept, self._size).copy_(self._pivots * self._signs)
        _blocks(self._products, self._size).copy_(self._energies)
        self._waiting = 0


def _state(gram: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Q and Z from their definitions; gram [I I], weight W' [I O], kept bool [I]."""
    cross = gram[~kept][:, kept]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[kept][:, kept].double())).to(gram.dtype)
    regression = cross @ inverse
    rest = gram[~kept][:, ~kept] - regression @ cross.T
    swept = torch.cat([torch.cat([-inverse, regression.T], 1), torch.cat([regression, rest], 1)])
    refit = torch.cat([weight[kept] + regression.T @ weight[~kept], rest @ weight[~kept]])
    order = torch.cat([kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]]).argsort()
    return swept[order][:, order], refit[order]


def _factor(pivot: Tensor) -> tuple[Tensor, Tensor]:
    """K with K K' = pivot, lower triangular, and its inverse."""
    if len(pivot) == 1:
        factor = pivot.sqrt()
        return factor, 1 / factor
    factor = torch.linalg.cholesky(pivot)
    return factor, torch.linalg.solve_triangular(factor, torch.eye(len(pivot)).to(pivot), upper=False)


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """The diagonal blocks [n g g] of a matrix, as a view."""
    rows, columns = matrix.stride()
    return matrix.as_strided((len(matrix) // size, size, size), (size * (rows + columns), rows, columns))
