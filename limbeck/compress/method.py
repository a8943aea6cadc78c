"""What can be done to the groups of linear layers of a model, and what is told of each layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from limbeck.compress.blocks import Blocks, Group
from limbeck.compress.folds import Fold
from limbeck.compress.problem import LayerProblem
from limbeck.compress.weights import narrowed
from limbeck.models.experts import fused_state


class Solution(NamedTuple):
    """What a method made of a group."""

    weights: list[Tensor]
    """float32 [O I] for each layer, as the walk goes on with them."""
    factors: Tensor | None = None
    """[I] > 0: the weights expect inputs divided by these; the norm before has taken the division."""
    kept: list[list[int]] | None = None
    """Groups of inputs that stay, for each layer; None where all do."""


class Method(Protocol):
    """What is done to the groups of linear layers."""

    folds: bool
    """Whether it moves factors from inputs into weights, where a normalisation can take them."""

    def wants(self, group: Group) -> bool:
        """Whether the group is worked on; others cost nothing."""
        ...

    def check(self, blocks: Blocks, groups: Sequence[Group]) -> None:
        """Raises: ConfigError, ModelError or CompressionError for what cannot be done, before anything is."""
        ...

    def solve(self, group: Group, problems: Sequence[LayerProblem], fold: Fold | None) -> Solution:
        """New weights for the layers of a group; `problems` have their weights and the moments of their input."""
        ...

    def tensors(self, number: int, block: Any, blocks: Blocks) -> dict[str, Tensor]:
        """What is written for a finished block; called once, after all its groups."""
        ...


class Record(NamedTuple):
    """What happened to one layer."""

    name: str
    error: float
    """`layer_error` against the weight it had; of the weights themselves where no input was seen."""
    seconds: float
    """Of solving, shared by the group's layers."""
    tokens: int
    kept: list[int] | None = None
    """Groups of inputs that stay (neurons, KV groups)."""


def stored_state(block: Any, dtypes: Mapping[str, torch.dtype], without: Collection[str] = ()) -> dict[str, Tensor]:
    """The weights of a block in the dtypes of the file it came from, by name within it.

    Raises: CompressionError for a weight that its dtype does not hold.
    """
    state = fused_state(block).items()
    return {name: narrowed(name, tensor, dtypes[name]) for name, tensor in state if name not in without}
