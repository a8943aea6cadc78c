"""Which scheme for which layers under a budget of bits: errors of every choice from stored moments, then the best sum.

Layers that share an input get one scheme: engines fuse them into one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from limbeck.compress.blocks import Blocks, Group, groups_of
from limbeck.compress.problem import LayerProblem, Moments, layer_error
from limbeck.compress.quantize import mixed, rtn
from limbeck.compress.quantize.methods import grid_of
from limbeck.compress.quantize.mixed import Option, quantized_bytes
from limbeck.compress.quantize.rtn import RtnConfig
from limbeck.config import checked
from limbeck.errors import ConfigError
from limbeck.models.schemes import Scheme, scheme_of
from limbeck.progress import bar


@checked
class MixedConfig:
    """Several widths in one model."""

    bits_per_weight: float
    """Most bits a weight on average over all quantised layers, scales included."""
    schemes: tuple[str, ...] = ("w4a16", "w8a16")
    """Weight-only schemes to choose from."""

    def __post_init__(self) -> None:
        if self.bits_per_weight <= 0:
            raise ConfigError(f"mixed.bits_per_weight must be positive; found {self.bits_per_weight}")
        if len(self.schemes) < 2 or any(scheme_of(name).format != "pack-quantized" for name in self.schemes):
            raise ConfigError(f"mixed.schemes: {list(self.schemes)}; expected two or more of w2a16 to w8a16")


def _problems(group: Group, moments: Moments) -> list[LayerProblem]:
    return [
        LayerProblem(linear.weight.data, moments, f"layers.{group.block}.{name}")
        for name, linear in group.linears.items()
    ]


def choose_schemes(
    blocks: Blocks,
    moments: Callable[[Group], Moments],
    config: MixedConfig,
    group_size: int | None,
    ignore: Sequence[str],
) -> dict[str, Scheme]:
    """The scheme of every layer by its name, such as `layers.0.mlp.down_proj`.

    A choice is rated by the relative error of rounding to nearest, summed over the layers: what a better solver leaves
    differs by layer far less than by width.

    Args:
      blocks: the model; it can be walked afterwards.
      moments: of a group's input.
      config: schemes and budget.
      group_size: of the schemes.
      ignore: parts of the names of layers that are not quantised.
    Raises: CompressionError when the narrowest schemes exceed the budget.
    """
    schemes = [scheme_of(name, group_size) for name in config.schemes]
    names: list[list[str]] = []
    options: list[list[Option]] = []
    weights = 0
    with bar("widths", len(blocks)) as progress:
        for number in range(len(blocks)):
            with blocks.block(number, torch.device("cpu")) as block:
                for group in filter(None, (group.without(ignore) for group in groups_of(block, number))):
                    problems = _problems(group, moments(group._replace(block=blocks.kept[number])))
                    names.append([problem.name for problem in problems])
                    options.append([_rated(problems, scheme) for scheme in schemes])
                    weights += sum(problem.weight.numel() for problem in problems)
            progress.advance(1)
    picks = mixed.choose(options, int(config.bits_per_weight * weights / 8))
    return {name: schemes[pick] for members, pick in zip(names, picks, strict=True) for name in members}


def _rated(problems: Sequence[LayerProblem], scheme: Scheme) -> Option:
    grid = grid_of(scheme)
    errors = [layer_error(problem, rtn.solve(problem, grid, RtnConfig()).dequantize()) for problem in problems]
    return Option(sum(errors), sum(quantized_bytes(len(p.weight), p.weight.shape[1], grid) for p in problems))
