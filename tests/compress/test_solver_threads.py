"""Solvers at the sizes of real layers, on one thread and on two: the same choice, and as good a weight.

Small layers do not show it: from a few hundred rows on libraries take other paths, on several threads.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test_prune_contract import FAMILY
from test_quantize_contract import SOLVERS

from limbeck.compress.problem import LayerProblem, Moments, layer_error
from limbeck.compress.prune.osscar import OsscarConfig, path
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.prune.sweep import Sweep
from limbeck.compress.quantize.grid import Grid


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def layer(outputs: int, inputs: int, seed: int = 0) -> LayerProblem:
    """Correlated inputs of different sizes, fresh moments so that nothing is taken from an earlier call."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs // 2, inputs, generator=draw) / inputs**0.5
    noise = 0.3 * torch.randn(2 * inputs, inputs, generator=draw)
    x = (torch.randn(2 * inputs, inputs // 2, generator=draw) @ mix + noise) * torch.randn(inputs, generator=draw).exp()
    return LayerProblem(torch.randn(outputs, inputs, generator=draw) / inputs**0.5, Moments.of(x))


def energies(problem: LayerProblem, size: int) -> torch.Tensor:
    """What the removal of each group costs, group by group in float64: tr(M_gg^-1 B_g' B_g), M the inverse of H."""
    inverse = problem.moments.damped().double().inverse()
    costs = []
    for start in range(0, len(inverse), size):
        here = slice(start, start + size)
        block = problem.weight[:, here].double()
        costs.append((block @ inverse[here, here].inverse() * block).sum())
    return torch.stack(costs)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("groups", "size"), [(3, 192), (4, 160), (2, 384), (8, 64)])
def test_the_cost_of_heads_is_that_of_each_group_by_itself(groups, size, count):
    problem = layer(64, groups * size)
    with threads(count):
        found = Sweep(problem, size, 0.01)._scores()
    torch.testing.assert_close(found.double(), energies(problem, size), rtol=1e-3, atol=0.0)


def test_heads_of_several_hundred_inputs_are_chosen_alike_by_one_thread_and_by_two():
    chosen = []
    for count in (1, 2):
        with threads(count):
            chosen.append([kept.groups.tolist() for kept in path(layer(96, 3 * 192), 192, [1, 2], OsscarConfig())])
    assert chosen[0] == chosen[1]


ALL = {
    **{
        f"prune {name} {text}": (solve, config, text)
        for name, (solve, config) in FAMILY.items()
        for text in ("0.5", "2:4")
    },
    **{f"quantize {name}": (solve, None, None) for name, solve in SOLVERS.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [576, 1536])
@pytest.mark.parametrize("name", ALL)
def test_every_solver_is_as_good_on_two_threads_as_on_one(name, inputs):
    solve, config, text = ALL[name]
    errors = []
    for count in (1, 2):
        problem = layer(192, inputs, seed=1)
        with threads(count):
            if text is None:
                weight = solve(problem, Grid(bits=4, group_size=64)).dequantize()
            else:
                weight = solve(problem, Pattern.parse(text), config)
            errors.append(layer_error(problem, weight))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)  # sums in another order decide ties


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "size", "keep"), [(1536, 1, 1024), (1536, 1, 300), (2048, 256, 5), (576, 192, 2)])
def test_osscar_is_as_good_on_two_threads_as_on_one(inputs, size, keep):
    errors = []
    for count in (1, 2):
        problem = layer(192, inputs, seed=2)
        with threads(count):
            errors.append(layer_error(problem, path(problem, size, [keep], OsscarConfig())[0].weight))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)  # sums in another order decide ties
