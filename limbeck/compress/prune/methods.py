"""The pruning methods on the walk: single weights by one of four solvers, or whole neurons and KV groups by OSSCAR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.compress.blocks import Blocks, Group, groups_of
from limbeck.compress.folds import Fold
from limbeck.compress.method import Solution, stored_state
from limbeck.compress.problem import LayerProblem
from limbeck.compress.prune import osscar
from limbeck.compress.prune.osscar import OsscarConfig
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.shape_cost import whole_shape
from limbeck.compress.shrink import BlockKept, BlockSizes, shrink_block
from limbeck.errors import CompressionError
from limbeck.models.experts import UnfusedExperts, fused_state

Solve = Callable[[LayerProblem, Pattern, Any], Tensor]


class Sparsify:
    """Zeros where the solver puts them; the shapes stay."""

    folds = False

    def __init__(self, solve: Solve, pattern: Pattern, settings: Any) -> None:
        self._solve, self._pattern, self._settings = solve, pattern, settings

    def wants(self, group: Group) -> bool:
        """All groups."""
        return True

    def check(self, blocks: Blocks, groups: Sequence[Group]) -> None:
        """Raises: CompressionError when the pattern does not divide the inputs of a layer."""
        for group in groups:
            for name, linear in group.linears.items():
                self._pattern.check(linear.in_features, f"layers.{group.block}.{name}")

    def solve(self, group: Group, problems: Sequence[LayerProblem], fold: Fold | None) -> Solution:
        """Each layer by itself."""
        return Solution([self._solve(problem, self._pattern, self._settings) for problem in problems])

    def tensors(self, number: int, block: Any, blocks: Blocks) -> dict[str, Tensor]:
        """The block with its zeros."""
        return blocks.stored(number, stored_state(block, blocks.dtypes))


class Structured:
    """Whole neurons and KV groups go, the same number in every block; the written blocks are smaller."""

    folds = False

    def __init__(self, config: Any, neurons: int, kv_groups: int, settings: OsscarConfig) -> None:
        """Args: the whole model's config; what stays of neurons and KV groups; how they are chosen."""
        whole = whole_shape(config)
        self._sizes, self._settings = BlockSizes.of(config), settings
        self._whole_neurons, self._whole_groups = whole.neurons, whole.kv_groups
        self._neurons, self._prunes_neurons = neurons, neurons < whole.neurons
        self._groups, self._prunes_groups = kv_groups, kv_groups < whole.kv_groups
        self._kept_neurons: list[Tensor] = []
        self._kept_groups: Tensor | None = None

    def wants(self, group: Group) -> bool:
        """The layers that read neurons or heads."""
        return (group.role == "mlp_out" and self._prunes_neurons) or (
            group.role == "attention_out" and self._prunes_groups
        )

    def check(self, blocks: Blocks, groups: Sequence[Group]) -> None:
        """Cut every block's shapes as they will be.

        Raises: CompressionError for a block that has no such parts, or has some that are to be left as they are.
        """
        wanted = {group.name: group for group in groups}
        for number, block in blocks.shapes():
            for group in (group for group in groups_of(block, number) if self.wants(group)):
                if group.name not in wanted:
                    raise CompressionError(f"{group.name}: is to be ignored, but all blocks get the same sizes.")
                self._check_inputs(group)
            neurons = torch.arange(self._neurons) if self._prunes_neurons else None
            kept = BlockKept(neurons, torch.arange(self._groups) if self._prunes_groups else None)
            shrink_block(fused_state(block), kept, self._sizes)

    def _check_inputs(self, group: Group) -> None:
        """The sizes of a block must be those of the config, of which there is one number for all."""
        size = self._sizes.head_dim * self._sizes.query_heads
        whole = self._whole_neurons if group.role == "mlp_out" else self._whole_groups * size
        for name, linear in group.linears.items():
            if linear.in_features != whole:
                raise CompressionError(
                    f"layers.{group.block}.{name}: has {linear.in_features} inputs where the config says {whole}; "
                    "such a model has no smaller config."
                )

    def solve(self, group: Group, problems: Sequence[LayerProblem], fold: Fold | None) -> Solution:
        """Choose what stays of the one layer of the group, and refit it."""
        if group.role == "mlp_out":
            kept = osscar.solve(problems[0], 1, self._neurons, self._settings)
            self._kept_neurons.append(kept.groups)
        else:
            size = self._sizes.head_dim * self._sizes.query_heads
            kept = osscar.solve(problems[0], size, self._groups, self._settings)
            self._kept_groups = kept.groups
        return Solution([kept.weight], kept=[kept.groups.tolist()])

    def tensors(self, number: int, block: Any, blocks: Blocks) -> dict[str, Tensor]:
        """The smaller block."""
        neurons = torch.stack(self._kept_neurons) if self._kept_neurons else None
        if neurons is not None and not _has_experts(block):
            neurons = neurons[0]
        kept = BlockKept(neurons, self._kept_groups)
        self._kept_neurons, self._kept_groups = [], None
        return blocks.stored(number, shrink_block(stored_state(block, blocks.dtypes), kept, self._sizes))


def _has_experts(block: Any) -> bool:
    return any(isinstance(module, UnfusedExperts) for module in block.modules())
