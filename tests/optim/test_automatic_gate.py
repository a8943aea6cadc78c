"""grad_threshold="auto": opens on the way into a saddle at any rate, and stays shut while training goes on."""

import math

import pytest
import torch

from limbeck.optim import ASGLD, Perturb, rule


def descend(make, gradient, start, steps):
    """The step of the first fire (None: never), and where the run ends."""
    x = torch.tensor(start, requires_grad=True)
    optimizer, first = make([x]), None
    for step in range(steps):
        x.grad = gradient(x.detach())
        optimizer.step()
        if first is None and optimizer.param_groups[0]["fires"]:
            first = step
    return first, x.detach()


def two_valleys(x):
    """f = -0.15 a^2 + 0.04 a^4 + 0.4 |y|^2, whose minima are at a = 1.37."""
    slope = 0.8 * x
    slope[0] = -0.3 * x[0] + 0.16 * x[0] ** 3
    return slope


SLOW = [0.8, 0.3, 0.1, 0.03, 0.01]


@pytest.mark.parametrize("lr", SLOW)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_opens_on_the_way_into_a_strict_saddle(lr, momentum):
    first, end = descend(
        lambda p: ASGLD(p, lr, momentum=momentum, grad_threshold="auto", noise_radius=5e-3, escape_steps=8, seed=1),
        two_valleys,
        [0.0, 1.0, -0.5, 0.3],
        int(60 / lr) + 400,
    )
    assert first is not None
    assert abs(float(end[0])) == pytest.approx(math.sqrt(0.3 / 0.16), abs=0.1)


@pytest.mark.parametrize("lr", SLOW)
def test_its_default_radius_is_enough_to_leave(lr):
    _, end = descend(
        lambda p: ASGLD(p, lr, grad_threshold="auto", seed=1), two_valleys, [0.0, 1.0, -0.5, 0.3], int(120 / lr) + 1500
    )
    assert abs(float(end[0])) > 1


def test_it_opens_for_any_optimizer():
    first, end = descend(
        lambda p: Perturb(torch.optim.SGD(p, 0.05), grad_threshold="auto", noise_radius=5e-3, seed=1),
        two_valleys,
        [0.0, 1.0, -0.5, 0.3],
        3000,
    )
    assert first is not None
    assert abs(float(end[0])) > 1


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_when_it_opens_does_not_depend_on_the_unit_of_the_loss(scale):
    first, _ = descend(
        lambda p: ASGLD(p, 0.05 / scale, grad_threshold="auto", noise_radius=1e-9, seed=1),
        lambda x: two_valleys(x) * scale,
        [0.0, 1.0, -0.5, 0.3],
        300,
    )
    reference, _ = descend(
        lambda p: ASGLD(p, 0.05, grad_threshold="auto", noise_radius=1e-9, seed=1),
        two_valleys,
        [0.0, 1.0, -0.5, 0.3],
        300,
    )
    assert first == reference


@pytest.mark.parametrize("power", [0.1, 0.3, 0.5])
def test_it_stays_shut_where_gradients_fall_as_a_small_power_of_time(power):
    times = iter(range(1, 10_000))
    first, _ = descend(
        lambda p: ASGLD(p, 1e-9, grad_threshold="auto", seed=1),
        lambda x: torch.full_like(x, next(times) ** -power),
        [0.0, 0.0],
        4000,
    )
    assert first is None


def test_it_stays_shut_in_the_noise_of_mini_batches():
    generator = torch.Generator().manual_seed(0)
    first, _ = descend(
        lambda p: ASGLD(p, 1e-3, grad_threshold="auto", seed=1),
        lambda x: x + torch.randn(40, generator=generator),
        [1.0] * 40,
        2000,
    )
    assert first is None


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_what_is_zero_or_not_finite_stays_out_of_the_median(bad):
    assert rule.next_median(2.0, 7, bad, 1) == (2.0, 7)
    assert rule.next_median(0.0, 0, bad, 1) == (0.0, 0)
    median, steps = rule.next_median(torch.tensor(2.0), torch.tensor(7), torch.tensor(bad), 1)
    assert (float(median), int(steps)) == (2.0, 7)


def test_a_power_of_time_opens_it_after_as_many_steps_as_the_rule_says():
    """S over m is t^(-p/2), a twentieth at 20^(2/p) steps: 400 for p = 1."""
    median, total, opened = 0.0, 0.0, None
    for step in range(2000):
        weight = rule.auto_weight(step)
        if weight and opened is None:
            median, total = rule.next_median(median, total, 1 / (step + 1), weight)
            opened = step if 1 / (step + 1) <= rule.AUTO_FRACTION * median else None
    assert 200 < opened < 800


@pytest.mark.parametrize("lr", [0.5, 0.1])
def test_it_opens_at_a_saddle_whose_curvatures_are_spread_over_three_decades(lr):
    curvatures = torch.logspace(-3, 0, 10)
    first, _ = descend(
        lambda p: ASGLD(p, lr, grad_threshold="auto", noise_radius=1e-9, seed=1),
        lambda x: curvatures * x,
        [1.0] * 10,
        int(200 / lr),
    )
    # Long before the flattest curvature has died out, which takes 1000 / lr steps.
    assert first is not None


def test_the_median_is_the_weighted_geometric_mean_on_the_host_and_off_it():
    values, weights = [3.0, 0.1, 20.0, 7.0], [1.0, 1 / 2, 1 / 3, 1 / 4]
    host, device = (0.0, 0.0), (torch.tensor(0.0), torch.tensor(0.0))
    for value, weight in zip(values, weights, strict=True):
        host = rule.next_median(*host, value, weight)
        device = rule.next_median(*device, torch.tensor(value), weight)
    logs = sum(weight * math.log(value) for value, weight in zip(values, weights, strict=True))
    expected = math.exp(logs / sum(weights))
    assert host[0] == pytest.approx(expected)
    assert float(device[0]) == pytest.approx(expected, rel=1e-6)


def test_the_whole_gradient_is_read_at_every_sixteenth_step_only(monkeypatch):
    p = torch.zeros(200_000, requires_grad=True)
    optimizer = ASGLD([p], 1e-9, grad_threshold="auto", seed=1)
    read = []

    def square(tensor):
        read.append(optimizer.param_groups[0]["noise_step"])
        return 200_000.0

    monkeypatch.setattr("limbeck.optim.gates._exact_square", square)
    for _ in range(64):
        p.grad = torch.ones(200_000)
        optimizer.step()
    assert read == [*range(16), 16, 32, 48]


def test_a_start_at_an_exact_saddle_asks_for_a_radius():
    p = torch.zeros(5, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold="auto")
    with pytest.warns(UserWarning, match="set noise_radius"):
        descend(lambda params: optimizer, torch.zeros_like, [0.0], 1)
        p.grad = torch.zeros(5)
        optimizer.step()
    moved = ASGLD([p], 0.1, grad_threshold="auto", noise_radius=0.1)
    p.grad = torch.zeros(5)
    moved.step()
    assert p.detach().any()


def test_the_median_resumes():
    p = torch.ones(5, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold="auto", seed=1)
    for _ in range(20):
        p.grad = p.detach().clone()
        optimizer.step()
    other = ASGLD([p], 0.1, grad_threshold="auto")
    other.load_state_dict(optimizer.state_dict())
    group = other.param_groups[0]
    assert group["gate_median"] == optimizer.param_groups[0]["gate_median"] > 0
    assert group["gate_median_weight"] == sum(map(rule.auto_weight, range(20)))
