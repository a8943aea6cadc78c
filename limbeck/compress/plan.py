"""Products and memory of a compression before it starts, from the shapes alone.

A rough estimate: products are counted, and every solver has a factor for what it does beside products. Checked for
GPTQ on SmolLM2-135M only: 66 s estimated, 60 s measured, one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

from limbeck.compress.blocks import Group, groups_of
from limbeck.models.experts import unfuse

_FACTORIZATION = 20.0
"""Float64 factorisations of I x I, in multiplications and additions of float32 per I^3."""
SOLVER_PRODUCTS = {
    "magnitude": 0.0,
    "wanda": 0.0,
    "sparsegpt": 6.0,
    "alps": 120.0,
    "osscar": 12.0,
    "depth": 0.0,
    "rtn": 0.0,
    "gptq": 6.0,
    "quantease": 60.0,
}
"""Multiplications and additions per O I^2."""


class WorkCount(NamedTuple):
    """What a compression multiplies and holds."""

    flops: float
    """Of passes, moments and solvers, the latter's other work included by their factors."""
    peak_bytes: int


def count_work(
    layers: Iterable[nn.Module],
    config: Any,
    padded_tokens: int,
    tokens: int,
    wants: Callable[[Group], bool],
    solver: str,
    *,
    dense_targets: bool = False,
    walks: bool = True,
) -> WorkCount:
    """Work of a compression from shapes alone.

    Args:
      layers: decoder layers, on the meta device or not; mixtures are taken apart in place.
      config: of the model.
      padded_tokens, tokens: calibration tokens with padding and without.
      wants: whether a group of layers is solved.
      solver: a key of SOLVER_PRODUCTS.
      dense_targets: whether a dense model is passed along.
      walks: False when stored moments are read.
    """
    streams = 2 if dense_targets else 1
    flops, widest, largest_block, largest_gram = 0.0, 0, 0, 0
    for number, layer in enumerate(layers):
        unfuse(layer)
        weights = sum(parameter.numel() for parameter in layer.parameters())
        flops += walks * streams * 2.0 * padded_tokens * weights
        groups = list(filter(wants, groups_of(layer, number)))
        for group in groups:
            flops += walks * 2.0 * tokens * _inputs(group) ** 2 + _solving(group, solver)
        outputs = list(map(_outputs, groups_of(layer, number)))
        widest = max(widest, *outputs, *map(_inputs, groups)) if groups else max(outputs, default=0)
        largest_block = max(largest_block, weights)
        largest_gram = max([largest_gram, *map(_inputs, groups)])
    # Inputs, outputs and their activation are alive at the widest place of a block; float32 throughout.
    passing = padded_tokens * (2 * streams * config.hidden_size + 3 * widest) if walks else 0
    if dense_targets:
        passing += tokens * (3 * config.hidden_size + widest)
    solving = 8 * largest_gram**2
    embedding = getattr(config, "vocab_size", 0) * config.hidden_size
    return WorkCount(flops, int(4 * (passing + solving + (2 + streams) * largest_block + embedding)))


def _inputs(group: Group) -> int:
    return next(iter(group.linears.values())).in_features


def _outputs(group: Group) -> int:
    return sum(linear.out_features for linear in group.linears.values())


def _solving(group: Group, solver: str) -> float:
    inputs, outputs = _inputs(group), _outputs(group)
    products = SOLVER_PRODUCTS[solver]
    return products * outputs * inputs**2 + (_FACTORIZATION * inputs**3 if products else 0.0)
