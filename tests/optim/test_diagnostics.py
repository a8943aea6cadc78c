"""Curvature against dense eigenvalues, predictions against simulation."""

import math

import pytest
import torch

from limbeck.optim import diagnostics, theory
from studies.problems import QuadraticSaddle, QuarticSaddle, make


def symmetric(num_matrices: int, size: int, seed: int = 0) -> torch.Tensor:
    matrices = torch.randn(num_matrices, size, size, generator=torch.Generator().manual_seed(seed)).double()
    return matrices + matrices.mT


def test_lanczos_finds_the_smallest_eigenvalue_of_every_matrix_and_its_direction():
    matrices = symmetric(3, 30)
    start = torch.randn(3, 30, generator=torch.Generator().manual_seed(1)).double()
    found = diagnostics.smallest_eigenvalue(lambda v: (matrices @ v.unsqueeze(-1)).squeeze(-1), start, 30)
    torch.testing.assert_close(found.eigenvalue, torch.linalg.eigvalsh(matrices)[:, 0])
    applied = (matrices @ found.direction.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(applied, found.eigenvalue.unsqueeze(-1) * found.direction, atol=1e-8, rtol=0)
    assert found.num_products == 30


def test_the_residual_bounds_the_distance_to_an_eigenvalue_when_lanczos_stops_early():
    matrices = symmetric(4, 60)
    start = torch.randn(4, 60, generator=torch.Generator().manual_seed(1)).double()
    found = diagnostics.smallest_eigenvalue(lambda v: (matrices @ v.unsqueeze(-1)).squeeze(-1), start, 12)
    exact = torch.linalg.eigvalsh(matrices)
    assert (found.eigenvalue >= exact[:, 0] - 1e-10).all()
    distance = (exact - found.eigenvalue.unsqueeze(-1)).abs().min(-1).values
    assert (distance <= found.residual + 1e-10).all()
    assert found.num_products == 12


def test_an_exhausted_krylov_space_does_not_stop_the_search():
    # Two distinct eigenvalues: the first Krylov space has two dimensions; a multiple of the identity has one.
    saddle = QuadraticSaddle(num_dims=20)
    points = torch.zeros(2, 20, dtype=torch.float64)
    found = diagnostics.curvature_at(saddle.loss, points, num_products=10)
    torch.testing.assert_close(found.eigenvalue, torch.full((2,), -0.2).double())
    flat = diagnostics.curvature_at(lambda x: 0.5 * x.square().sum(-1), points, num_products=5)
    torch.testing.assert_close(flat.eigenvalue, torch.ones(2).double())
    linear = diagnostics.curvature_at(lambda x: x.sum(-1), points, num_products=3)
    assert linear.eigenvalue.abs().max() == 0


def test_the_bound_on_products_is_enough_in_a_thousand_dimensions():
    saddle = QuarticSaddle(num_dims=1000)
    products = diagnostics.products_needed(1000, smoothness=1.0, tolerance=0.02)
    found = diagnostics.curvature_at(saddle.loss, torch.randn(4, 1000).double() * 0.01, products)
    assert products < 100
    assert (found.eigenvalue < -0.18).all()
    assert diagnostics.products_needed(5, 100.0, 1e-6) == 5


def test_second_order_tells_a_saddle_a_slope_and_a_minimum_apart():
    saddle = QuarticSaddle(num_dims=6)
    (minimum, _) = saddle.facts().minima
    slope = torch.zeros(6)
    slope[1] = 1.0
    points = torch.stack([torch.zeros(6), slope, minimum]).double()
    result = diagnostics.second_order(saddle.loss, points, eps=1e-3, curvature_tolerance=0.05)
    assert result.passes.tolist() == [False, False, True]
    assert result.gradient_norm[1] == pytest.approx(1.0)
    assert float(result.curvature.eigenvalue[0]) == pytest.approx(-0.2)


def test_growth_is_one_plus_lr_gamma_and_larger_with_momentum():
    assert theory.growth_per_step(0.5, 0.2) == pytest.approx(1.1)
    assert theory.escape_slope(0.5, 0.2) == pytest.approx(1 / (2 * math.log(1.1)))
    assert theory.escape_slope(0.5, 0.1, momentum=0.9) == pytest.approx(2.7, abs=0.05)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_predicted_escape_time_is_the_median_of_simulated_escapes(momentum):
    lr, gamma, radius, num_dims = 0.1, 0.2, 1e-3, 50
    kick = radius * torch.randn(20001, generator=torch.Generator().manual_seed(0)).double() / math.sqrt(num_dims)
    position, buffer, steps = kick.clone(), torch.zeros_like(kick), torch.zeros(len(kick))
    while (inside := position.abs() < 1.0).any():
        steps += inside
        buffer = momentum * buffer - gamma * position
        position = position - lr * buffer
    predicted = theory.predicted_escape_steps(lr, gamma, num_dims, radius, 1.0, momentum)
    assert float(steps.median()) == pytest.approx(predicted, abs=0.02 * predicted + 0.6)


def test_the_predicted_loss_bump_is_the_mean_rise_over_kicks():
    problem = make("matrix_factorisation", 5)
    point = torch.nn.Parameter(problem.facts().minima[0].double())
    radius, num_kicks = 1e-2, 20000
    trace, error = diagnostics.hessian_trace(lambda: problem.loss(point), [point], num_probes=200)
    bump = theory.predicted_loss_bump(radius, trace, problem.num_scalars)
    kicks = torch.randn(num_kicks, *problem.shape, generator=torch.Generator().manual_seed(0)).double()
    rises = problem.loss(point.detach() + kicks * radius / math.sqrt(problem.num_scalars))
    noise = float(rises.std()) / math.sqrt(num_kicks)
    assert bump == pytest.approx(float(rises.mean()), abs=4 * (noise + bump * error / trace))
    assert 0 < error < 0.1 * trace
