"""What a model loses in a shape: every layer cut by OSSCAR from stored moments, measured end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from limbeck.compress.passes import Passes
from limbeck.compress.problem import LayerProblem, Moments
from limbeck.compress.prune.osscar import OsscarConfig, inputs_of, refit, select
from limbeck.compress.shape_cost import Shape
from limbeck.compress.shrink import BlockSizes
from limbeck.errors import CompressionError


class _Part(NamedTuple):
    """One linear layer whose inputs are cut."""

    name: str
    weight: Tensor
    """[O I], the model's own, changed in place."""
    dense: Tensor
    """A copy of it as it was."""
    group_size: int


class ShapeLoss:
    """Mean loss a token of shapes of one model.

    A context: the model's weights are set for the shape that is asked for, and put back at the end.
    """

    def __init__(
        self,
        model: Any,
        passes: Passes,
        moments: Mapping[str, Moments],
        config: OsscarConfig,
        levels: Mapping[str, Sequence[int]],
    ) -> None:
        """Find the layers.

        Args:
          model: as given to `passes`.
          moments: by the names in `budget.choose`.
          config: of the solver.
          levels: the numbers of neurons and of KV groups that will be asked for, by kind.
        Raises: CompressionError when moments are missing.
        """
        self._passes, self._moments, self._config, self._levels = passes, moments, config, levels
        sizes = BlockSizes.of(model.config)
        self._parts = {"neurons": _mlp_parts(passes), "kv_groups": _attention_parts(passes, sizes)}
        self._now = {kind: max(keeps) for kind, keeps in levels.items()}
        self._groups: dict[tuple[str, int], Tensor] = {}
        self._known: dict[Shape, float] = {}
        for kind, keeps in levels.items():
            for part in self._parts[kind]:
                if len(keeps) > 1 and part.name not in moments:
                    raise CompressionError(f"budget: no moments of {part.name}; collect them for the whole model.")

    def __call__(self, shape: Shape) -> float:
        """Mean loss a token of the model in a shape."""
        if shape not in self._known:
            self._known[shape] = self.at(shape).mean_loss(shape.layers)
        return self._known[shape]

    def at(self, shape: Shape) -> Passes:
        """The passes, through weights that are set for the widths of a shape."""
        for kind in self._parts:
            keep = getattr(shape, kind)
            if self._now[kind] != keep:
                for part in self._parts[kind]:
                    part.weight.copy_(self._solution(kind, part, keep))
                self._now[kind] = keep
        return self._passes

    def __enter__(self) -> ShapeLoss:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parts in self._parts.values():
            for part in parts:
                part.weight.copy_(part.dense)

    def _solution(self, kind: str, part: _Part, keep: int) -> Tensor:
        if keep == max(self._levels[kind]):
            return part.dense
        problem = LayerProblem(part.dense.float(), self._moments[part.name], part.name)
        if (part.name, keep) not in self._groups:
            # Several levels at once, since each goes on from the next larger one; those below a half are rarely needed.
            least = min(keep, max(self._levels[kind]) // 2)
            keeps = [level for level in self._levels[kind] if level >= least]
            chosen = select(problem, part.group_size, keeps, self._config)
            self._groups |= {(part.name, level): groups for level, groups in zip(keeps, chosen, strict=True)}
        inputs = inputs_of(problem, self._groups[part.name, keep], part.group_size)
        return refit(problem, inputs, self._config.damping)


def _attention_parts(passes: Passes, sizes: BlockSizes) -> list[_Part]:
    parts = []
    for number, layer in enumerate(passes.layers):
        weight = layer.self_attn.o_proj.weight.data
        size = sizes.head_dim * sizes.query_heads
        parts.append(_Part(f"layers.{number}.attention_out", weight, weight.clone(), size))
    return parts


def _mlp_parts(passes: Passes) -> list[_Part]:
    parts = []
    for number, layer in enumerate(passes.layers):
        name, experts = f"layers.{number}.mlp_out", getattr(layer.mlp, "experts", None)
        if experts is None:
            weight = layer.mlp.down_proj.weight.data
            parts.append(_Part(name, weight, weight.clone(), 1))
            continue
        for expert, weight in enumerate(experts.down_proj.data):
            parts.append(_Part(f"{name}.{expert}", weight, weight.clone(), 1))
    return parts
