"""Every problem's formula against its facts: stationary points, curvature, constants, unbiased batches."""

import dataclasses
import math

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.optim.diagnostics import curvature_at
from studies import problems
from studies.problems import PROBLEMS, Octopus, Problem, QuarticSaddle, SmallNet, ValleySaddle

SIZE = 6
NAMES = sorted(PROBLEMS)


def gradient(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    leaf = x.double().requires_grad_()
    return torch.autograd.grad(problem.loss(leaf).sum(), leaf)[0]


def random_points(problem: Problem, num_points: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return problem.project(torch.randn(num_points, *problem.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_points_side_by_side_give_the_losses_of_single_points(name):
    problem = problems.make(name, SIZE)
    points = random_points(problem, 3)
    together = problem.loss(points)
    alone = torch.stack([problem.loss(point) for point in points])
    torch.testing.assert_close(together, alone)
    assert together.shape == (3,)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_finite_differences(name):
    problem = problems.make(name, SIZE)
    points = random_points(problem, 2).mul(0.7).requires_grad_()
    assert torch.autograd.gradcheck(problem.loss, (points,), eps=1e-6, atol=1e-5)
    exact = points.detach()
    torch.testing.assert_close(problem.gradient(exact), gradient(problem, exact))


@pytest.mark.parametrize("name", NAMES)
def test_facts_saddles_and_minima_are_stationary_and_minima_have_the_lowest_loss(name):
    problem = problems.make(name, SIZE)
    facts = problem.facts()
    for point in (*facts.saddles, *facts.minima):
        assert point.shape == problem.shape
        assert gradient(problem, point).norm() < 1e-5
    for point in facts.minima:
        assert float(problem.loss(point.double())) == pytest.approx(facts.minimum_loss, abs=1e-6)
        assert float(curvature_at(problem.loss, point.double().unsqueeze(0)).eigenvalue) > -1e-5
    if facts.minimum_loss is not None:
        assert (problem.loss(random_points(problem, 50)) >= facts.minimum_loss - 1e-9).all()


@pytest.mark.parametrize("name", NAMES)
def test_facts_negative_curvature_is_that_of_the_first_saddle(name):
    problem = problems.make(name, SIZE)
    facts = problem.facts()
    if facts.negative_curvature is None:
        assert not facts.saddles
        return
    measured = curvature_at(problem.loss, facts.saddles[0].double().unsqueeze(0), num_products=60)
    assert float(-measured.eigenvalue) == pytest.approx(facts.negative_curvature, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", [name for name in NAMES if problems.make(name, SIZE).facts().smoothness])
def test_facts_constants_bound_the_hessian_and_its_change_within_the_radius(name):
    problem = problems.make(name, SIZE)
    facts = problem.facts()
    points = random_points(problem, 40).flatten(1)
    norms = torch.rand(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    points = points / points.norm(dim=1, keepdim=True) * norms * min(facts.radius, 3.0)
    hessians = [
        torch.autograd.functional.hessian(lambda v: problem.loss(v.view(problem.shape)), point) for point in points
    ]
    assert max(float(torch.linalg.matrix_norm(h, ord=2)) for h in hessians) <= facts.smoothness * (1 + 1e-9)
    for first, second, left, right in zip(hessians, hessians[1:], points, points[1:], strict=False):
        change = float(torch.linalg.matrix_norm(first - second, ord=2))
        assert change <= facts.hessian_lipschitz * float((left - right).norm()) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_batch_gradients_is_the_gradient(name):
    problem = problems.make(name, SIZE)
    point = random_points(problem, 1) * 0.5
    generator = torch.Generator().manual_seed(2)
    num_batches = 4000
    batch = problem.draw(num_batches, 8, generator)
    leaf = point.expand(num_batches, *problem.shape).clone().requires_grad_()
    sampled = torch.autograd.grad(problem.batch_loss(leaf, batch).sum(), leaf)[0].flatten(1)
    torch.testing.assert_close(problem.batch_gradient(leaf.detach(), batch).flatten(1), sampled)
    error = sampled.mean(0) - gradient(problem, point).flatten()
    spread = sampled.std(0) / math.sqrt(num_batches)
    assert (error.abs() <= 5 * spread + 1e-9).all()
    assert float(sampled.std(0).norm()) > 0


def test_tilt_noise_has_energy_sigma_squared_over_the_batch_in_any_dimension():
    for num_dims in (10, 1000):
        problem = QuarticSaddle(num_dims=num_dims, gradient_noise=3.0)
        tilts = problem.draw(400, 9, torch.Generator().manual_seed(0))
        assert float(tilts.square().sum(1).mean()) == pytest.approx(1.0, rel=0.15)


def test_the_axis_aligned_saddle_has_an_exactly_zero_gradient_and_the_rotated_one_is_it_turned():
    straight, turned = QuarticSaddle(num_dims=5), QuarticSaddle(num_dims=5, rotation_seed=3)
    assert gradient(straight, torch.zeros(5)).abs().max() == 0
    (minimum, _) = turned.facts().minima
    axis = torch.zeros(5)
    axis[0] = minimum.norm()
    torch.testing.assert_close(turned.loss(minimum), straight.loss(axis))
    assert float(turned.escape_coordinate(minimum)) == pytest.approx(float(minimum.norm()), rel=1e-5)


@pytest.mark.parametrize("coordinate", [0, 2, 3])
def test_the_octopus_and_its_gradient_are_continuous_where_pieces_meet(coordinate):
    octopus = Octopus(num_dims=4)
    tau = octopus.tau
    for edge in (tau, 2 * tau, -tau, -2 * tau):
        point = torch.tensor([4.2 * tau] * coordinate + [edge] + [0.3 * tau] * (3 - coordinate)).double()
        below, above = point.clone(), point.clone()
        below[coordinate] -= 1e-9
        above[coordinate] += 1e-9
        assert float(octopus.loss(above) - octopus.loss(below)) == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(gradient(octopus, above), gradient(octopus, below), atol=1e-5, rtol=0)


def test_the_octopus_gradient_in_closed_form_is_autograds_on_every_piece():
    octopus = Octopus(num_dims=4)
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(2000, 4, generator=generator, dtype=torch.float64) * 2 - 1) * 5 * octopus.tau
    points[:1000, 2:] *= 0.1
    torch.testing.assert_close(octopus.gradient(points), gradient(octopus, points))
    assert set(octopus.settled(points).tolist()) == {0, 1, 2, 3, 4}


def test_the_octopus_counts_settled_coordinates_from_the_first():
    octopus = Octopus(num_dims=3)
    far, near = 3 * octopus.tau, 0.1
    points = torch.tensor([[near, far, far], [-far, near, far], [far, far, -far]])
    assert octopus.settled(points).tolist() == [0, 1, 3]


def test_the_valley_gradient_falls_as_the_stated_power():
    valley = ValleySaddle(num_dims=3, tail=1.0)
    points = torch.zeros(2, 3)
    points[:, 0] = torch.tensor([100.0, 1000.0])
    norms = torch.stack([gradient(valley, point).norm() for point in points])
    assert float(torch.log10(norms[0] / norms[1])) == pytest.approx(2.0, abs=1e-3)


def test_hidden_units_that_are_alike_stay_alike_under_gradient_descent():
    net = SmallNet(kind="tanh")
    point = net.alike_units(0.3).double()
    for _ in range(20):
        point = point - 0.1 * gradient(net, point)
    first = point[: net.num_hidden * net.num_inputs].view(net.num_hidden, net.num_inputs)
    torch.testing.assert_close(first, first[:1].expand_as(first))


def test_projection_is_onto_the_sphere_and_leaves_free_problems_alone():
    points = torch.randn(4, SIZE)
    torch.testing.assert_close(problems.make("online_pca", SIZE).project(points).norm(dim=1), torch.ones(4))
    assert problems.make("free_pca", SIZE).project(points) is points


def test_configs_refuse_what_cannot_be():
    for name in NAMES:
        problem_class = type(problems.make(name, SIZE))
        for field in dataclasses.fields(problem_class):
            if field.name.startswith("num_"):
                with pytest.raises(ValueError, match=field.name.split("_")[0]):
                    problem_class(**{field.name: 0})
    with pytest.raises(ConfigError, match="octopus"):
        problems.make("octopsu", 3)
