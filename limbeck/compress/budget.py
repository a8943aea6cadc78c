"""Neurons, KV groups or whole layers: what to cut for a target, by the end-to-end loss of every unit saved.

From the whole model, each step tries one more unit of each kind and takes the one that costs the least loss for what
it saves, until the target is met. The search knows nothing of models: what a shape costs and loses are functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from typing import Any, Literal, NamedTuple

import torch

from limbeck.compress.calibrate import Rows
from limbeck.compress.passes import LossName, Passes
from limbeck.compress.problem import Moments
from limbeck.compress.prune.depth import losses_without
from limbeck.compress.prune.osscar import OsscarConfig
from limbeck.compress.shape_cost import Shape, ShapeCost
from limbeck.compress.shape_loss import ShapeLoss
from limbeck.compress.shrink import kv_group_choices, round_size
from limbeck.config import checked
from limbeck.errors import CompressionError, ConfigError

Kind = Literal["neurons", "kv_groups", "layers"]
KINDS: tuple[Kind, ...] = ("neurons", "kv_groups", "layers")


@checked
class BudgetConfig:
    """How small or how fast the model has to become, and what may be cut for it."""

    metric: Literal["parameters", "bytes", "milliseconds"] = "parameters"
    """What the target counts: all parameters, the bytes of the files that are written, or the time of one prompt."""
    target: float
    """Most of it that the smaller model may have."""
    prompt_tokens: int = 512
    """Length of the prompt that is timed (milliseconds)."""
    repeats: int = 5
    """Timed passes a shape, of which the median counts (milliseconds)."""
    kinds: tuple[Kind, ...] = KINDS
    """What may be cut: neurons, kv_groups (with their query heads), layers."""
    neuron_step: float = 0.0625
    """Share of the neurons in a unit."""
    multiple_of: int = 32
    """The neurons that stay are a multiple of this."""
    loss: LossName = "forward_kl"
    """Loss to the whole model, or of the tokens themselves (cross_entropy)."""
    osscar: OsscarConfig = field(default_factory=OsscarConfig)
    """How a layer's neurons and KV groups are chosen."""

    def __post_init__(self) -> None:
        if self.target <= 0 or self.prompt_tokens < 1 or self.repeats < 1 or self.multiple_of < 1:
            raise ConfigError("budget: target, prompt_tokens, repeats and multiple_of must be positive")
        if not 0 < self.neuron_step < 1:
            raise ConfigError(f"budget: neuron_step must lie between 0 and 1; found {self.neuron_step}")
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise ConfigError(f"budget: kinds are some of {', '.join(KINDS)}; found {', '.join(self.kinds) or 'none'}")


class Step(NamedTuple):
    """A shape that the search passed through."""

    shape: Shape
    cost: float
    """In units of the metric."""
    loss: float
    """Mean a token."""


Moves = Callable[[Shape], Iterable[Shape]]


def choose(
    model: Any, rows: Rows, moments: Mapping[str, Moments], config: BudgetConfig, dtype: torch.dtype
) -> list[Step]:
    """The shapes from the whole model to one within the target; the last is the choice.

    Args:
      model: a causal LM in evaluation mode; its weights change meanwhile and are put back.
      rows: held-out tokens for the loss.
      moments: of the inputs of o_proj and down_proj, named `layers.<n>.attention_out` and `layers.<n>.mlp_out`
        (`layers.<n>.mlp_out.<e>` for expert e).
      config: target and units.
      dtype: that the model is stored in, and will be.
    Raises: CompressionError when the target is out of reach.
    """
    units = _Units(model.config, config)
    cost = ShapeCost(model.config, dtype, model.device, config.metric, config.prompt_tokens, config.repeats)
    passes = Passes(model, rows, config.loss)
    with ShapeLoss(model, passes, moments, config.osscar, units.levels) as loss:
        steps = search(units.whole, lambda shape: units.smaller(shape, loss), cost, loss, config.target)
        return give_back(steps, units.larger, cost, loss, config.target)


def search(
    start: Shape, smaller: Moves, cost: Callable[[Shape], float], loss: Callable[[Shape], float], target: float
) -> list[Step]:
    """Take the unit with the least loss for each unit of cost that it saves, until the cost is within the target.

    What a move saves beyond the target counts for nothing, so that a large unit does not win by overshooting.

    Raises: CompressionError when no move saves anything and the target is not met.
    """
    steps = [Step(start, cost(start), loss(start))]
    while (now := steps[-1]).cost > target:
        rated = []
        for shape in smaller(now.shape):
            useful = now.cost - max(cost(shape), target)
            if useful > 0:
                step = Step(shape, cost(shape), loss(shape))
                rated.append((max(step.loss - now.loss, 0.0) / useful, -useful, step))
        if not rated:
            raise CompressionError(
                f"budget: target {target:g} is out of reach; the least with these kinds of cuts is {now.cost:g}."
            )
        steps.append(min(rated, key=lambda entry: entry[:2])[2])
    return steps


def give_back(
    steps: list[Step], larger: Moves, cost: Callable[[Shape], float], loss: Callable[[Shape], float], target: float
) -> list[Step]:
    """Put units back, the most helpful first, as long as the target allows it; the last step may have overshot."""
    steps = list(steps)
    while True:
        affordable = [shape for shape in larger(steps[-1].shape) if cost(shape) <= target]
        tried = [Step(shape, cost(shape), loss(shape)) for shape in affordable]
        best = min(tried, key=lambda step: step.loss, default=None)
        if best is None or best.loss >= steps[-1].loss:
            return steps
        steps.append(best)


class _Units:
    """The shapes one unit smaller or larger than a shape, for a model."""

    def __init__(self, config: Any, settings: BudgetConfig) -> None:
        neurons, layers = config.intermediate_size, config.num_hidden_layers
        groups = kv_group_choices(config)
        steps = int((1 - 1e-9) / settings.neuron_step) + 1
        sizes = {
            round_size(neurons * (1 - step * settings.neuron_step), settings.multiple_of, neurons)
            for step in range(steps)
        }
        self.whole = Shape(neurons, groups[-1], tuple(range(layers)))
        self.levels: dict[str, list[int]] = {
            "neurons": sorted(sizes) if "neurons" in settings.kinds else [neurons],
            "kv_groups": groups if "kv_groups" in settings.kinds else groups[-1:],
        }
        self._layers_may_go = "layers" in settings.kinds
        self._next: dict[tuple[int, ...], tuple[int, ...]] = {}

    def smaller(self, shape: Shape, loss: ShapeLoss) -> Iterable[Shape]:
        """One unit less of each kind; the layer that goes is the one whose absence costs least."""
        for kind, levels in self.levels.items():
            less = [level for level in levels if level < getattr(shape, kind)]
            if less:
                yield _with(shape, kind, less[-1])
        if self._layers_may_go and len(shape.layers) > 1:
            if shape.layers not in self._next:
                without = losses_without(loss.at(shape), shape.layers)
                place = min(range(len(without)), key=without.__getitem__)
                self._next[shape.layers] = shape.layers[:place] + shape.layers[place + 1 :]
            yield shape._replace(layers=self._next[shape.layers])

    def larger(self, shape: Shape) -> Iterable[Shape]:
        """One unit more of each kind, for layers each of those that went."""
        for kind, levels in self.levels.items():
            more = [level for level in levels if level > getattr(shape, kind)]
            if more:
                yield _with(shape, kind, more[0])
        for layer in set(self.whole.layers) - set(shape.layers):
            yield shape._replace(layers=tuple(sorted({*shape.layers, layer})))


def _with(shape: Shape, kind: str, level: int) -> Shape:
    return shape._replace(neurons=level) if kind == "neurons" else shape._replace(kv_groups=level)
