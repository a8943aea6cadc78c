"""Unstructured pruning against its formulas, brute force and plain twins, on correlated inputs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.compress.problem import LayerProblem, Moments, layer_error
from limbeck.compress.prune import alps, magnitude, sparsegpt, wanda
from limbeck.compress.prune.pattern import Pattern, largest_of_all
from limbeck.compress.prune.refit import RefitConfig, refit

MAGNITUDE, WANDA, SPARSEGPT, ALPS = (
    (magnitude.solve, magnitude.MagnitudeConfig()),
    (wanda.solve, wanda.WandaConfig()),
    (sparsegpt.solve, sparsegpt.SparseGptConfig()),
    (alps.solve, alps.AlpsConfig()),
)
FEW = settings(max_examples=15, deadline=None)


def made(outputs, inputs, seed=0, spread=0.5):
    """Inputs with a steep spectrum in a random basis, features of different sizes, some independent noise."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(inputs, inputs, generator=draw))[0]
    x = torch.randn(8 * inputs, inputs, generator=draw) * torch.arange(1, inputs + 1) ** -0.75 @ basis
    x = x * (spread * torch.randn(inputs, generator=draw)).exp()
    x = x + 0.3 * x.std(0) * torch.randn(x.shape, generator=draw)
    return LayerProblem(torch.randn(outputs, inputs, generator=draw), Moments.of(x))


def run(method, problem, pattern="0.5"):
    solve, config = method
    return solve(problem, Pattern.parse(pattern), config)


def damped_error(problem, weight):
    difference = (weight - problem.weight).double()
    return float((difference @ problem.moments.damped().double() * difference).sum())


def best_on(problem, keep):
    """The damped optimum on a support, row by row in float64."""
    gram, weight = problem.moments.damped().double(), problem.weight.double()
    best = torch.zeros_like(weight)
    for row, columns in enumerate(keep):
        inside = gram[columns][:, columns]
        best[row, columns] = torch.linalg.solve(inside, gram[columns] @ weight[row])
    return best


@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4"])
@pytest.mark.parametrize("shape", [(96, 160), (256, 160)])
def test_each_method_beats_the_simpler_one(pattern, shape):
    problem = made(*shape)
    errors = [layer_error(problem, run(method, problem, pattern)) for method in (MAGNITUDE, WANDA, SPARSEGPT, ALPS)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.65 * errors[2]
    refits = [(wanda.solve, wanda.WandaConfig(refit=True)), (sparsegpt.solve, sparsegpt.SparseGptConfig(refit=True))]
    for method, without in zip(refits, errors[1:3], strict=True):
        assert errors[3] < layer_error(problem, run(method, problem, pattern)) < 0.75 * without


@FEW
@given(seed=st.integers(0, 1000), share=st.sampled_from(["0.3", "0.5", "0.8", "2:4", "1:4"]))
def test_alps_is_never_worse_than_sparsegpt(seed, share):
    problem = made(24, 32, seed)
    least = damped_error(problem, run(SPARSEGPT, problem, share))
    assert damped_error(problem, run(ALPS, problem, share)) <= 1.001 * least


@FEW
@given(seed=st.integers(0, 1000), share=st.floats(0.1, 0.9))
def test_refit_is_the_optimum_on_its_support(seed, share):
    problem = made(12, 40, seed)
    keep = torch.rand(12, 40, generator=torch.Generator().manual_seed(seed)) > share
    weight = refit(problem, keep, RefitConfig(steps=200, tolerance=1e-7))
    assert not weight[~keep].any()
    torch.testing.assert_close(weight.double(), best_on(problem, keep), rtol=1e-2, atol=5e-3)
    gradient = (weight - problem.weight).double() @ problem.moments.damped().double()
    away = (problem.weight.double() @ problem.moments.damped().double()).norm()
    assert gradient[keep].norm() < 1e-3 * away
    assert damped_error(problem, weight) <= 1.0001 * damped_error(problem, best_on(problem, keep))


@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4"])
def test_default_refit_and_the_end_of_alps_come_close_to_the_optimum_on_their_support(pattern):
    problem = made(64, 128)
    for weight in (
        run(ALPS, problem, pattern),
        wanda.solve(problem, Pattern.parse(pattern), wanda.WandaConfig(refit=True)),
    ):
        assert damped_error(problem, weight) < 1.01 * damped_error(problem, best_on(problem, weight != 0))


def test_alps_comes_close_to_the_best_of_all_supports():
    ratios = []
    for seed in range(30):
        problem = made(4, 6, seed)
        supports = [torch.zeros(6, dtype=torch.bool) for _ in range(20)]
        for support, index in zip(supports, itertools.combinations(range(6), 3), strict=True):
            support[list(index)] = True
        gram = problem.moments.damped().double()
        difference = torch.stack([best_on(problem, s.expand(4, 6)) for s in supports]) - problem.weight.double()
        best = float((difference @ gram * difference).sum(-1).amin(0).sum())
        ratios.append(damped_error(problem, run(ALPS, problem, "3:6")) / best)
    assert min(ratios) > 1 - 1e-4
    assert sum(ratios) / len(ratios) < 1.1


def test_alps_finds_a_layer_that_is_sparse_already():
    problem = made(48, 64)
    keep = torch.rand(48, 64, generator=torch.Generator().manual_seed(3)) > 0.5
    sparse = LayerProblem(problem.weight * keep, problem.moments)
    weight = run(ALPS, sparse, str(1 - float(keep.float().mean())))
    torch.testing.assert_close(weight, sparse.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [WANDA, SPARSEGPT, ALPS], ids=["wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_size_of_the_inputs_does_not_matter(method, factor):
    problem = made(32, 48)
    scaled = LayerProblem(problem.weight, problem.moments.scaled(torch.full((48,), factor)))
    first, second = run(method, problem), run(method, scaled)
    assert ((first != 0) == (second != 0)).float().mean() > 0.995
    assert damped_error(problem, second) == pytest.approx(damped_error(problem, first), rel=5e-3)


@pytest.mark.parametrize("method", [MAGNITUDE, WANDA, SPARSEGPT, ALPS], ids=["magnitude", "wanda", "sparsegpt", "alps"])
def test_order_of_the_outputs_does_not_matter(method):
    problem = made(32, 48)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    permuted = LayerProblem(problem.weight[order], problem.moments)
    first, second = run(method, problem)[order], run(method, permuted)
    assert ((first != 0) == (second != 0)).float().mean() > 0.995
    assert damped_error(permuted, second) == pytest.approx(damped_error(permuted, first), rel=5e-3)


def test_wanda_scores_by_hand():
    inputs = torch.tensor([[3.0, 0.0, 1.0, 2.0], [0.0, 1.0, 1.0, 2.0]])  # norms 3, 1, sqrt 2, sqrt 8
    weight = torch.tensor([[1.0, 2.5, 2.0, 0.5], [-0.1, 1.0, -0.5, 0.4]])  # scores 3 2.5 2.83 1.41; .3 1 .71 1.13
    pruned = run(WANDA, LayerProblem(weight, Moments.of(inputs)))
    assert torch.equal(pruned, torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.4]]))


def test_magnitude_counts_over_the_whole_layer():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.4, 0.3, -0.2, 0.1]])
    problem = LayerProblem(weight, Moments.of(torch.ones(1, 4)))
    assert torch.equal(run(MAGNITUDE, problem), torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.0] * 4]))
    assert torch.equal(run(MAGNITUDE, problem, "1:2"), torch.tensor([[4.0, 0, 2.0, 0], [0.4, 0, -0.2, 0]]))


def sparsegpt_twin(problem, pattern, block):
    """Each removal by the formulas of optimal brain surgeon, with the inverse of what is left of H; float64."""
    gram, weight = problem.moments.damped().double(), problem.weight.double().clone()
    outputs, inputs = weight.shape
    keep = torch.ones_like(weight, dtype=torch.bool)
    cost = [torch.linalg.inv(gram[j:, j:])[0, 0] for j in range(inputs)]
    width = pattern.group or block
    for j in range(inputs):
        if j % width == 0:
            score = weight[:, j : j + width] ** 2 / torch.stack(cost[j : j + width])
            if pattern.group:
                gone = score.argsort(1)[:, : pattern.group - pattern.kept]
                keep[:, j : j + width] = keep[:, j : j + width].scatter(1, gone, False)
            else:
                count = round(pattern.sparsity * outputs * min(j + width, inputs)) - int((~keep[:, :j]).sum())
                gone = score.flatten().argsort()[:count]
                keep[gone // score.shape[1], j + gone % score.shape[1]] = False
        inverse = torch.linalg.inv(gram[j:, j:])
        lost = torch.where(keep[:, j], 0.0, weight[:, j])
        weight[:, j:] -= lost[:, None] / inverse[0, 0] * inverse[0]
    return weight * keep


@pytest.mark.parametrize(("pattern", "block"), [("0.5", 128), ("0.5", 8), ("0.7", 10), ("2:4", 128), ("2:4", 6)])
def test_sparsegpt_equals_removing_weight_by_weight(pattern, block):
    problem, pattern = made(16, 32), Pattern.parse(pattern)
    weight = sparsegpt.solve(problem, pattern, sparsegpt.SparseGptConfig(block_size=block))
    twin = sparsegpt_twin(problem, pattern, block)
    assert torch.equal(weight != 0, twin != 0)
    torch.testing.assert_close(weight.double(), twin, rtol=1e-3, atol=1e-3)


def test_sparsegpt_makes_up_for_weights_that_were_zero_before():
    problem = made(16, 32)
    mask = torch.rand(16, 32, generator=torch.Generator().manual_seed(1)) > 0.3
    masked = LayerProblem(problem.weight * mask, problem.moments, mask=mask)
    weight = run(SPARSEGPT, masked, "0.5")
    assert not weight[~mask].any()
    assert layer_error(masked, weight) < layer_error(masked, run(WANDA, masked, "0.5"))


@FEW
@given(
    size=st.sampled_from([1, 100, 70_000, 200_001]),
    share=st.floats(0, 1),
    kind=st.sampled_from(["normal", "equal", "few", "sorted", "spike"]),
)
def test_fast_selection_takes_exactly_the_largest(size, share, kind):
    draw = torch.Generator().manual_seed(size)
    scores = {
        "normal": lambda: torch.randn(size, generator=draw).abs(),
        "equal": lambda: torch.ones(size),
        "few": lambda: torch.randint(0, 3, (size,), generator=draw).float() - 1,
        "sorted": lambda: torch.arange(size).float(),
        "spike": lambda: torch.where(torch.rand(size, generator=draw) < 1e-3, 1e6, torch.rand(size, generator=draw)),
    }[kind]()
    count = round(share * size)
    keep = largest_of_all(scores, count)
    assert int(keep.sum()) == count
    assert torch.equal(scores[keep].sort().values, scores.sort().values[size - count :])
