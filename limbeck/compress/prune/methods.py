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
from limbeck.compress.shrink import BlockKept, BlockSizes, kv_group_choices, round_size, shrink_block
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

    def __init__(
        self, config: Any, neuron_sparsity: float, kv_group_sparsity: float, multiple_of: int, settings: OsscarConfig
    ) -> None:
        self.sizes, self._settings = BlockSizes.of(config), settings
        self.all_neurons, self.all_groups = config.intermediate_size, _groups_of(config)
        self.neurons = round_size((1 - neuron_sparsity) * self.all_neurons, multiple_of, self.all_neurons)
        wanted = (1 - kv_group_sparsity) * self.all_groups
        # transformers does not load every number of heads, so the nearest one that it loads is taken.
        self.kv_groups = min(kv_group_choices(config), key=lambda count: (abs(count - wanted), count))
        self._neurons: list[Tensor] = []
        self._kept_groups: Tensor | None = None

    def wants(self, group: Group) -> bool:
        """The layers that read neurons or heads."""
        return (group.role == "mlp_out" and self.neurons < self.all_neurons) or (
            group.role == "attention_out" and self.kv_groups < self.all_groups
        )

    def solve(self, group: Group, problems: Sequence[LayerProblem]) -> Solution:
        """Choose what stays of the one layer of the group, and refit it."""
        if group.role == "mlp_out":
            kept = osscar.solve(problems[0], 1, self.neurons, self._settings)
            self._neurons.append(kept.groups)
        else:
            size = self.sizes.head_dim * self.sizes.query_heads
            kept = osscar.solve(problems[0], size, self.kv_groups, self._settings)
            self._kept_groups = kept.groups
        return Solution([kept.weight], kept=[kept.groups.tolist()])

    def tensors(self, number: int, block: Any, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """The smaller block."""
        neurons = torch.stack(self._neurons) if self._neurons else None
        if neurons is not None and not _has_experts(block):
            neurons = neurons[0]
        kept = BlockKept(neurons, self._kept_groups)
        self._neurons, self._kept_groups = [], None
        return shrink_block(stored_state(block, dtypes), kept, self.sizes)


def _groups_of(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _has_experts(block: Any) -> bool:
    return any(isinstance(module, UnfusedExperts) for module in block.modules())
