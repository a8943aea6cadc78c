"""Curvature where an optimizer stands: from Hessian-vector products (double backward) and the Lanczos method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
"""Points `[P, *shape]` to one loss each `[P]`."""
Product = Callable[[Tensor], Tensor]
"""A symmetric matrix a point, applied to one vector a point: `[P, n]` to `[P, n]`."""


class Curvature(NamedTuple):
    """The smallest Hessian eigenvalue of each of P points, as the Lanczos method found it."""

    eigenvalue: Tensor
    """Ritz value `[P]`: never below the smallest eigenvalue, up to rounding."""
    residual: Tensor
    """Norm of H v - eigenvalue v `[P]`: some eigenvalue lies this near to the Ritz value."""
    direction: Tensor
    """The Ritz vector v, of norm 1: `[P, n]`."""
    num_products: int
    """Hessian-vector products a point."""


class SecondOrder(NamedTuple):
    """Whether each of P points is an (eps, curvature_tolerance) second-order stationary point."""

    passes: Tensor
    """Both conditions hold: `[P]`, bool."""
    gradient_norm: Tensor
    """Norm of the full gradient: `[P]`."""
    curvature: Curvature
    """The smallest Hessian eigenvalue, measured."""


def smallest_eigenvalue(product: Product, start: Tensor, num_products: int) -> Curvature:
    """The smallest eigenvalue of P symmetric matrices at once: Lanczos, fully reorthogonalised.

    Args:
      product: applies the matrices, `[P, n]` to `[P, n]`.
      start: random start vectors `[P, n]`; float64 keeps the basis orthogonal to rounding.
      num_products: length of the Krylov basis; `min(num_products, n)` products are taken.
    """
    tiny = torch.finfo(start.dtype).tiny
    basis = [start / start.norm(dim=-1, keepdim=True)]
    diagonal: list[Tensor] = []
    coupling: list[Tensor] = []
    for _ in range(min(num_products, start.shape[-1])):
        image = product(basis[-1])
        diagonal.append((image * basis[-1]).sum(-1))
        image, scale = _orthogonal(image, basis), image.norm(dim=-1)
        norm = image.norm(dim=-1)
        # The Krylov space of this point is exhausted: go on in a fresh direction, coupled to none so far.
        exhausted = norm <= 1e3 * torch.finfo(start.dtype).eps * scale.clamp_min(tiny)
        fresh = torch.randn(start.shape, dtype=start.dtype, generator=_generator(len(basis)))
        following = torch.where(exhausted.unsqueeze(-1), _orthogonal(fresh, basis), image)
        coupling.append(torch.where(exhausted, 0.0, norm))
        basis.append(following / following.norm(dim=-1, keepdim=True).clamp_min(tiny))
    matrix = torch.diag_embed(torch.stack(diagonal, -1))
    if len(coupling) > 1:
        beside = torch.stack(coupling[:-1], -1)
        matrix = matrix + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    values, vectors = torch.linalg.eigh(matrix)
    weights = vectors[..., 0]
    direction = torch.einsum("pkn,pk->pn", torch.stack(basis[:-1], -2), weights)
    return Curvature(values[..., 0], coupling[-1] * weights[..., -1].abs(), direction, len(diagonal))


def products_needed(num_scalars: int, smoothness: float, tolerance: float, failure: float = 0.01) -> int:
    """Lanczos products that find the smallest eigenvalue to `tolerance` with probability 1 - failure.

    0.5 ln(d / failure^2) sqrt(L / tolerance) + 1, and never more than d.

    Source: Kuczynski and Wozniakowski 1992, as quoted in the saddle-escape literature; the constant is not
    re-derived here.
    """
    bound = 0.5 * math.log(num_scalars / failure**2) * math.sqrt(smoothness / tolerance) + 1
    return max(1, min(num_scalars, math.ceil(bound)))


def curvature_at(loss: Loss, points: Tensor, num_products: int = 40, seed: int = 0) -> Curvature:
    """The smallest Hessian eigenvalue of `loss` at every point `[P, *shape]`, in the dtype of the points."""
    leaf = points.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf).sum(), leaf, create_graph=True)

    def product(vectors: Tensor) -> Tensor:
        if not slope.requires_grad:
            return torch.zeros_like(vectors)
        inner = (slope * vectors.view_as(slope)).sum()
        (image,) = torch.autograd.grad(inner, leaf, retain_graph=True, materialize_grads=True)
        return image.flatten(1)

    start = torch.randn(points.flatten(1).shape, dtype=points.dtype, generator=_generator(seed))
    return smallest_eigenvalue(product, start, num_products)


def second_order(
    loss: Loss, points: Tensor, eps: float, curvature_tolerance: float, num_products: int = 40, seed: int = 0
) -> SecondOrder:
    """Test every point for ||grad f|| <= eps and lambda_min(H) >= -curvature_tolerance.

    Args:
      loss: the exact loss, not a mini-batch's.
      points: `[P, *shape]`.
      eps: bound on the gradient norm.
      curvature_tolerance: sqrt(rho eps) where the Hessian's Lipschitz constant rho is known.
      num_products: Lanczos products; the Ritz value errs upwards, so too few may let a saddle pass (see
      `products_needed`).
    """
    leaf = points.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    norm = slope.flatten(1).norm(dim=-1)
    curvature = curvature_at(loss, points, num_products, seed)
    return SecondOrder((norm <= eps) & (curvature.eigenvalue >= -curvature_tolerance), norm, curvature)


def hessian_trace(
    loss: Callable[[], Tensor], parameters: Iterable[Tensor], num_probes: int = 8, seed: int = 0
) -> tuple[float, float]:
    """Trace of the Hessian of the scalar `loss()` in all `parameters`, and its standard error.

    `theory.predicted_loss_bump` turns it into what one kick of noise costs.

    Source: Hutchinson 1990: the mean of v^T H v over random sign vectors v.
    """
    leaves = [parameter for parameter in parameters if parameter.requires_grad]
    slope = _flat(torch.autograd.grad(loss(), leaves, create_graph=True, materialize_grads=True))
    if not slope.requires_grad:  # that of a linear loss
        return 0.0, 0.0
    signs = torch.randint(2, (num_probes, len(slope)), generator=_generator(seed)).to(slope) * 2 - 1
    products = [torch.autograd.grad(slope, leaves, probe, retain_graph=True, materialize_grads=True) for probe in signs]
    traces = torch.stack([_flat(image) @ probe for image, probe in zip(products, signs, strict=True)]).double()
    error = float(traces.std() / math.sqrt(num_probes)) if num_probes > 1 else math.inf
    return float(traces.mean()), error


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _orthogonal(vectors: Tensor, basis: list[Tensor]) -> Tensor:
    # Twice is enough (Parlett): the second pass removes what rounding left of the first.
    stacked = torch.stack(basis, -2)
    for _ in range(2):
        vectors = vectors - torch.einsum("pkn,pk->pn", stacked, torch.einsum("pkn,pn->pk", stacked, vectors))
    return vectors


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
