"""OSSCAR: which groups of inputs a layer can do without, and what the others have to become.

A group is one neuron of an MLP, or all inputs of o_proj that belong to one KV group. Where OSSCAR removes t groups at
once to be fast, this file removes them one by one, at the same speed: removing a group is a sweep (Gaussian
elimination with the group as pivot), a sweep is a product of low rank, and products of many sweeps are applied to the
large matrices together. A sweep undoes itself, so that the local search takes groups back in by the same steps.

Source: OSSCAR (2403.12983), greedy removal and local search; Goodnight (1979) for the sweep operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.compress.problem import DAMPING, PRUNED_FROM, LayerProblem
from limbeck.compress.prune.sweep import Sweep
from limbeck.config import checked
from limbeck.errors import CompressionError, ConfigError

_LEAST_GAIN = 1e-3
"""Share by which an exchange must win more than it loses; above the drift of float32."""


@checked
class OsscarConfig:
    """Structured pruning of a layer's inputs."""

    swap: int = 16
    """Kept groups that the local search gives up at once for as many others; halved whenever that does not help."""
    steps: int = 30
    """Most exchanges tried by the local search; 0 for greedy removal alone."""
    damping: float = DAMPING
    """Share of the mean diagonal of H that is added to its diagonal."""

    def __post_init__(self) -> None:
        if self.swap < 1 or self.steps < 0 or self.damping < 0:
            raise ConfigError(
                f"swap {self.swap}, steps {self.steps}, damping {self.damping}: expected at least 1, 0 and 0"
            )


class Kept(NamedTuple):
    """The groups that stay, and the weight that makes the best of them."""

    groups: Tensor
    """int64 [K], sorted."""
    weight: Tensor
    """float32 [O I], zero in removed inputs."""


def solve(problem: LayerProblem, group_size: int, keep: int, config: OsscarConfig) -> Kept:
    """Choose `keep` groups S and the weight B on them that lose least of the layer's outputs.

        min tr((B - W) H (B - W)')  over S and B = W_S + W_R H_RS (H_SS)^-1,  R = the inputs that go

    Args:
      problem: the layer, without a mask.
      group_size: consecutive inputs in a group; 1 for neurons, head size x query heads of a KV group for o_proj.
      keep: groups that stay, at least 1.
      config: local search and damping.
    Raises: CompressionError when the sizes do not fit.
    """
    return path(problem, group_size, [keep], config)[0]


def path(problem: LayerProblem, group_size: int, keeps: Sequence[int], config: OsscarConfig) -> list[Kept]:
    """Solutions for several numbers of kept groups, in the order asked for; each starts from the next larger one."""
    chosen = select(problem, group_size, keeps, config)
    return [Kept(groups, refit(problem, inputs_of(problem, groups, group_size), config.damping)) for groups in chosen]


def select(problem: LayerProblem, group_size: int, keeps: Sequence[int], config: OsscarConfig) -> list[Tensor]:
    """The groups of `path` alone, int64 [K] each, without a refit."""
    groups = _check(problem, group_size, keeps)
    swap = config.swap if config.steps else 0
    sweep = Sweep(problem, group_size, config.damping, min(swap, groups // 2))
    chosen: dict[int, Tensor] = {}
    for keep in sorted(set(keeps), reverse=True):
        for _ in range(sweep.count - keep):
            sweep.remove_cheapest()
        _search(sweep, min(swap, keep, groups - keep), config.steps)
        chosen[keep] = sweep.kept.nonzero()[:, 0]
    return [chosen[keep] for keep in keeps]


def inputs_of(problem: LayerProblem, groups: Tensor, group_size: int) -> Tensor:
    """The inputs of some groups, bool [I]."""
    inputs = torch.zeros(problem.weight.shape[1], dtype=torch.bool, device=problem.weight.device)
    inputs.view(-1, group_size)[groups] = True
    return inputs


def refit(problem: LayerProblem, inputs: Tensor, damping: float = DAMPING) -> Tensor:
    """The best weight [O I] that reads only some inputs: W_S + W_R H_RS (H_SS)^-1, zero elsewhere.

    Args:
      problem: the layer.
      inputs: bool [I], True for S.
      damping: share of the mean diagonal of H that is added to its diagonal.
    """
    weight = problem.weight * inputs
    if not bool(inputs.all()):
        gram = problem.moments.damped(damping)
        factor = torch.linalg.cholesky(gram[inputs][:, inputs].double())
        missing = problem.weight[:, ~inputs] @ gram[~inputs][:, inputs]
        weight[:, inputs] += torch.cholesky_solve(missing.T.double(), factor).T.float()
    return weight


def _search(sweep: Sweep, swap: int, steps: int) -> None:
    """Give up the `swap` cheapest groups for the best ones, one by one; halve `swap` where that does not help."""
    for _ in range(steps):
        if swap < 1:
            return
        sweep.mark()
        lost = sum(sweep.remove_cheapest() for _ in range(swap))
        won = sum(sweep.add_best() for _ in range(swap))
        if won <= lost * (1 + _LEAST_GAIN):
            sweep.back_to_mark()
            swap //= 2


def _check(problem: LayerProblem, group_size: int, keeps: Sequence[int]) -> int:
    inputs = problem.weight.shape[1]
    if problem.mask is not None and _has_single_zeros(problem.mask):
        raise CompressionError(
            f"{problem.name}: has single weights pruned already, and a refit would bring them back; prune groups first."
        )
    if group_size < 1 or inputs % group_size:
        raise CompressionError(f"{problem.name}: {inputs} inputs do not divide into groups of {group_size}.")
    groups = inputs // group_size
    for keep in keeps:
        if not 1 <= keep <= groups:
            raise CompressionError(f"{problem.name}: keep {keep} of {groups} groups; expected 1 to {groups}.")
    return groups


def _has_single_zeros(mask: Tensor) -> bool:
    """Whether a mask forbids more than whole inputs and outputs, which are dead and stay so by themselves."""
    alive = mask[mask.any(1)][:, mask.any(0)]
    return float(alive.float().mean()) < 1 - PRUNED_FROM if alive.numel() else False
