"""OSSCAR against brute force in float64, on correlated inputs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.compress.problem import LayerProblem, Moments, layer_error
from limbeck.compress.prune.osscar import Kept, OsscarConfig, path, refit, solve
from limbeck.compress.prune.sweep import Sweep
from limbeck.errors import CompressionError, ConfigError

FEW = settings(max_examples=25, deadline=None)
GREEDY, SEARCH = OsscarConfig(steps=0), OsscarConfig()


def made(outputs, inputs, seed=0, tokens=None, rank=None):
    """Inputs that are mixtures of fewer sources, of very different sizes, plus a little noise."""
    draw = torch.Generator().manual_seed(seed)
    tokens, rank = tokens or 8 * inputs, rank or max(inputs // 2, 1)
    x = torch.randn(tokens, rank, generator=draw) @ torch.randn(rank, inputs, generator=draw)
    x = (x + 0.5 * torch.randn(tokens, inputs, generator=draw)) * torch.randn(inputs, generator=draw).exp()
    return LayerProblem(torch.randn(outputs, inputs, generator=draw), Moments.of(x))


def best_on(problem, inputs, damping=0.01):
    """The damped squared error of the best weight that reads only `inputs`, float64."""
    gram, weight = problem.moments.damped(damping).double(), problem.weight.double()
    index = torch.tensor(inputs)
    inner = torch.linalg.solve(gram[index][:, index], gram[index] @ weight.T)
    return float((weight @ gram * weight).sum() - (inner * (gram[index] @ weight.T)).sum())


def error_of(problem, kept: Kept):
    """The damped squared error of a solution, float64."""
    difference = (kept.weight - problem.weight).double()
    return float((difference @ problem.moments.damped().double() * difference).sum())


def inputs_of(groups, size):
    return [int(group) * size + offset for group in groups for offset in range(size)]


def brute_greedy(problem, size, keep):
    groups = list(range(problem.weight.shape[1] // size))
    while len(groups) > keep:
        without = [[other for other in groups if other != group] for group in groups]
        groups = min(without, key=lambda left: best_on(problem, inputs_of(left, size)))
    return groups


@FEW
@given(st.integers(0, 10_000), st.sampled_from([(1, 7), (1, 12), (2, 6), (3, 5)]), st.data())
def test_greedy_is_brute_force_deletion(seed, shape, data):
    size, groups = shape
    problem = made(4, size * groups, seed)
    keep = data.draw(st.integers(1, groups))
    kept = solve(problem, size, keep, GREEDY)
    want = best_on(problem, inputs_of(brute_greedy(problem, size, keep), size))
    # Ties aside, the sets are the same; their errors always are.
    assert error_of(problem, kept) == pytest.approx(want, rel=1e-3, abs=1e-5 * float(problem.weight.square().sum()))
    assert kept.groups.dtype == torch.int64 and kept.groups.tolist() == sorted(set(kept.groups.tolist()))
    assert len(kept.groups) == keep


@FEW
@given(st.integers(0, 10_000), st.sampled_from([1, 4]), st.integers(1, 8))
def test_refit_is_optimal_on_its_support(seed, size, keep):
    problem = made(5, 8 * size, seed)
    kept = solve(problem, size, keep, SEARCH)
    inside = torch.zeros(8 * size, dtype=torch.bool)
    inside[inputs_of(kept.groups, size)] = True
    assert not kept.weight[:, ~inside].any()
    gram = problem.moments.damped().double()
    gradient = ((kept.weight - problem.weight).double() @ gram)[:, inside]
    scale = (problem.weight.double().abs() @ gram.abs())[:, inside]
    assert float((gradient.abs() / scale).max()) < 1e-5


@FEW
@given(st.integers(0, 10_000), st.sampled_from([1, 3]))
def test_error_falls_with_every_kept_group_and_search_is_never_worse(seed, size):
    problem = made(6, 10 * size, seed)
    keeps = list(range(1, 11))
    greedy = [error_of(problem, kept) for kept in path(problem, size, keeps, GREEDY)]
    slack = 1e-5 * (best_on(problem, [0]) + greedy[0])
    assert all(less >= more - slack for less, more in itertools.pairwise(greedy))
    for keep, error in zip(keeps, greedy, strict=True):
        assert error_of(problem, solve(problem, size, keep, SEARCH)) <= error + slack
    assert greedy[-1] == 0


@pytest.mark.parametrize("groups", [8, 10, 12])
def test_heads_nearly_reach_the_exhaustive_optimum(groups):
    ratios = []
    for seed, keep in itertools.product(range(3), (groups // 2, groups - 3)):
        problem = made(16, 4 * groups, seed, rank=2 * groups)
        best = min(best_on(problem, inputs_of(some, 4)) for some in itertools.combinations(range(groups), keep))
        ratios.append(error_of(problem, solve(problem, 4, keep, SEARCH)) / best)
    assert max(ratios) < 1.10 and sum(ratios) / len(ratios) < 1.02


def test_search_gains_where_greedy_is_short_sighted():
    gains = []
    for seed in range(5):
        problem = made(48, 96, seed)
        greedy, searched = (error_of(problem, solve(problem, 1, 40, config)) for config in (GREEDY, SEARCH))
        gains.append(searched / greedy)
    assert max(gains) <= 1 and min(gains) < 0.99


@pytest.mark.parametrize("size", [1, 8])
def test_state_stays_exact_over_many_sweeps(size):
    """Removals beyond the half (a restart from H), then additions, against a direct computation."""
    problem = made(24, 192, 1)
    sweep = Sweep(problem, size, 0.01, exchange=2)
    error, groups = 0.0, 192 // size
    for _ in range(groups * 3 // 4):
        error += sweep.remove_cheapest()
    assert error == pytest.approx(best_on(problem, sweep.inputs().nonzero()[:, 0].tolist()), rel=1e-3)
    sweep.mark()
    before = sweep.kept.clone()
    lost = sweep.remove_cheapest() + sweep.remove_cheapest()
    won = sweep.add_best() + sweep.add_best()
    assert sweep.count == groups - groups * 3 // 4
    assert error + lost - won == pytest.approx(best_on(problem, sweep.inputs().nonzero()[:, 0].tolist()), rel=1e-3)
    sweep.back_to_mark()
    assert torch.equal(sweep.kept, before)
    assert sweep.remove_cheapest() <= lost


def test_path_takes_budgets_in_any_order():
    problem = made(8, 24, 3)
    one, other = path(problem, 2, [4, 9], GREEDY), path(problem, 2, [9, 4], GREEDY)
    assert torch.equal(one[0].groups, other[1].groups) and torch.equal(one[1].weight, other[0].weight)
    assert set(one[0].groups.tolist()) <= set(one[1].groups.tolist())


def test_an_output_of_zeros_does_not_matter():
    problem = made(8, 24, 3)
    weight = torch.cat([torch.zeros(1, 24), problem.weight])
    kept = solve(LayerProblem(weight, problem.moments), 1, 12, SEARCH)
    assert torch.equal(kept.groups, solve(problem, 1, 12, SEARCH).groups)
    assert layer_error(problem, kept.weight[1:]) < 1


def test_an_important_input_whose_weights_cancel_stays():
    problem = made(8, 24, 3)
    weight = problem.weight.clone()
    weight[:, 5] = torch.tensor([100.0, -100.0]).repeat(4)
    assert 5 in solve(LayerProblem(weight, problem.moments), 1, 4, SEARCH).groups


def test_dead_inputs_go_first():
    problem = made(8, 24, 3)
    gram = problem.moments.gram.clone()
    gram[[2, 7]] = 0
    gram[:, [2, 7]] = 0
    moments = Moments(gram, problem.moments.absolute_mean, problem.moments.absolute_max, problem.moments.tokens)
    kept = solve(LayerProblem(problem.weight, moments), 1, 20, SEARCH)
    assert not {2, 7} & set(kept.groups.tolist())
    assert kept.weight.isfinite().all()


def test_without_tokens_the_largest_weights_stay():
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    problem = LayerProblem(weight, Moments.of(torch.zeros(0, 10)))
    kept = solve(problem, 1, 4, SEARCH)
    assert kept.groups.tolist() == weight.square().sum(0).topk(4).indices.sort().values.tolist()
    torch.testing.assert_close(kept.weight[:, kept.groups], weight[:, kept.groups])


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_inputs(tokens):
    problem = made(4, 16, 2, tokens=tokens)
    kept = solve(problem, 1, 3, SEARCH)
    assert kept.weight.isfinite().all()
    assert error_of(problem, kept) <= best_on(problem, brute_greedy(problem, 1, 3)) * 1.01


@pytest.mark.parametrize("size", [1, 4])
def test_almost_no_damping_of_a_singular_matrix(size):
    problem = made(6, 48, 2, tokens=12)
    sweep = Sweep(problem, size, 0.0)
    error = sum(sweep.remove_cheapest() for _ in range(24 // size))
    # Twelve tokens: far fewer inputs than half carry everything.
    assert error < 1e-3 * best_on(problem, [0], 0.0)
    assert error == pytest.approx(best_on(problem, sweep.inputs().nonzero()[:, 0].tolist(), 0.0), rel=1e-2, abs=1e-3)
    kept = solve(problem, size, 24 // size, OsscarConfig(damping=0.0))
    assert layer_error(problem, kept.weight) < 1e-3


def test_all_kept_is_the_layer_itself():
    problem = made(4, 16, 2)
    assert torch.equal(solve(problem, 4, 4, SEARCH).weight, problem.weight)
    assert torch.equal(refit(problem, torch.ones(16, dtype=torch.bool)), problem.weight)


def test_what_does_not_fit_is_refused():
    problem = made(4, 16, 2)
    with pytest.raises(CompressionError, match="16 inputs do not divide into groups of 5"):
        solve(problem, 5, 1, SEARCH)
    with pytest.raises(CompressionError, match="keep 5 of 4 groups; expected 1 to 4"):
        solve(problem, 4, 5, SEARCH)
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) > 0.3
    masked = LayerProblem(problem.weight * mask, problem.moments, mask=mask)
    with pytest.raises(CompressionError, match="prune groups first"):
        solve(masked, 4, 2, SEARCH)
    with pytest.raises(ConfigError, match="swap 0"):
        OsscarConfig(swap=0)
