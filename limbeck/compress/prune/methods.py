"""The pruning methods on the walk: single weights by one of four solvers, or whole neurons and KV groups by OSSCAR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.compress.blocks import Group
from limbeck.compress.problem import LayerProblem
from limbeck.compress.prune import osscar
from limbeck.compress.prune.osscar import OsscarConfig
from limbeck.compress.shape_cost import whole_shape
from limbeck.compress.shrink import BlockKept, BlockSizes, shrink_block
from limbeck.compress.walk import Solution, stored_state
from limbeck.models.experts import UnfusedExperts

Solve = Callable[[LayerProblem], Tensor]


class Sparsify:
    """Zeros where the solver puts them; the shapes stay."""

    def __init__(self, solve: Solve) -> None:
        self._solve = solve

    def wants(self, group: Group) -> bool:
        """All groups."""
        return True

    def solve(self, group: Group, problems: Sequence[LayerProblem]) -> Solution:
        """Each layer by itself."""
        return Solution([self._solve(problem) for problem in problems])

    def tensors(self, number: int, block: Any, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """The block with its zeros."""
        return stored_state(block, dtypes)


class Structured:
    """Whole neurons and KV groups go, the same number in every block; the written blocks are smaller."""

    def __init__(self, config: Any, neurons: int, kv_groups: int, settings: OsscarConfig) -> None:
        """Args: the whole model's config; what stays of neurons and KV groups; how they are chosen."""
        whole = whole_shape(config)
        self._sizes, self._settings = BlockSizes.of(config), settings
        self._neurons, self._prunes_neurons = neurons, neurons < whole.neurons
        self._groups, self._prunes_groups = kv_groups, kv_groups < whole.kv_groups
        self._kept_neurons: list[Tensor] = []
        self._kept_groups: Tensor | None = None

    def wants(self, group: Group) -> bool:
        """The layers that read neurons or heads."""
        return (group.role == "mlp_out" and self._prunes_neurons) or (
            group.role == "attention_out" and self._prunes_groups
        )

    def solve(self, group: Group, problems: Sequence[LayerProblem]) -> Solution:
        """Choose what stays of the one layer of the group, and refit it."""
        if group.role == "mlp_out":
            kept = osscar.solve(problems[0], 1, self._neurons, self._settings)
            self._kept_neurons.append(kept.groups)
        else:
            size = self._sizes.head_dim * self._sizes.query_heads
            kept = osscar.solve(problems[0], size, self._groups, self._settings)
            self._kept_groups = kept.groups
        return Solution([kept.weight], kept=[kept.groups.tolist()])

    def tensors(self, number: int, block: Any, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """The smaller block."""
        neurons = torch.stack(self._kept_neurons) if self._kept_neurons else None
        if neurons is not None and not _has_experts(block):
            neurons = neurons[0]
        kept = BlockKept(neurons, self._kept_groups)
        self._kept_neurons, self._kept_groups = [], None
        return shrink_block(stored_state(block, dtypes), kept, self._sizes)


def _has_experts(block: Any) -> bool:
    return any(isinstance(module, UnfusedExperts) for module in block.modules())
