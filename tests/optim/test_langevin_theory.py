"""The formulas of limbeck.optim.theory against numbers worked out elsewhere and against simulation."""

import math

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.optim import ASGLD, SGLD
from limbeck.optim.theory import (
    escape_slope,
    escape_window,
    from_constants,
    predicted_escape_steps,
    predicted_loss_bump,
    radius_to_temperature,
    stationary_variance,
    temperature_to_radius,
)


def test_the_constants_of_perturbed_gradient_descent():
    made = from_constants(L=10.0, rho=2.0, eps=0.01, delta=0.1, delta_f=3.0, d=100, c=0.5)
    chi = 3 * math.log(100 * 10 * 3 / (0.5 * 1e-4 * 0.1))
    assert made.lr == 0.05
    assert made.noise_radius == pytest.approx(math.sqrt(0.5) / chi**2 * 0.001)
    assert made.grad_threshold == pytest.approx(math.sqrt(0.5) / chi**2 * 0.01)
    assert made.loss_drop == pytest.approx(0.5 / chi**3 * math.sqrt(1e-6 / 2))
    assert made.escape_steps == math.ceil(chi / 0.25 * 10 / math.sqrt(0.02))
    assert from_constants(L=1, rho=1, eps=10.0, delta=0.5, delta_f=1, d=1).grad_threshold == pytest.approx(10 / 144)


@pytest.mark.parametrize("wrong", [{"L": 0.0}, {"eps": -1.0}, {"delta": 1.0}, {"c": 2.0}])
def test_constants_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="from_constants"):
        from_constants(**{"L": 1.0, "rho": 1.0, "eps": 0.1, "delta": 0.1, "delta_f": 1.0, "d": 10, **wrong})


def test_radius_and_temperature_are_inverse():
    assert temperature_to_radius(0.3, 0.1, 50) == pytest.approx(math.sqrt(2 * 0.1 * 0.3 * 50))
    assert radius_to_temperature(temperature_to_radius(0.3, 0.1, 50), 0.1, 50) == pytest.approx(0.3)


def test_the_escape_window():
    assert (escape_window(10), escape_window(1_000_000)) == (55, 115)


@pytest.mark.parametrize(
    "gamma, lr, momentum, slope",
    [
        (0.1, 0.5, 0.0, 10.2),
        (0.1, 0.5, 0.9, 2.7),
        (0.1, 0.05, 0.0, 100),
        (0.1, 0.05, 0.9, 13.5),
        (0.03, 0.5, 0.0, 33.6),
        (0.03, 0.5, 0.9, 6.0),
    ],
)
def test_the_slope_of_the_escape_time(gamma, lr, momentum, slope):
    assert escape_slope(lr, gamma, momentum) == pytest.approx(slope, rel=0.03)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_predicted_escape_time_is_that_of_the_recursion(momentum):
    lr, gamma, d, radius, distance = 0.5, 0.1, 1000, 0.01, 1.0
    a, change, steps = 0.6744897501960817 * radius / math.sqrt(d), 0.0, 0
    while a < distance:
        change = momentum * change + lr * gamma * a
        a, steps = a + change, steps + 1
    assert predicted_escape_steps(lr, gamma, d, radius, distance, momentum) == pytest.approx(steps, abs=1.0)


def test_the_predicted_loss_bump_is_the_mean_of_many_kicks():
    curvature = torch.linspace(0.1, 3.0, 40)
    p = torch.zeros(40, requires_grad=True)
    optimizer = ASGLD([p], 0.1, mode="constant", noise_radius=0.5)
    bumps = []
    for _ in range(1000):
        with torch.no_grad():
            p.zero_()
        p.grad = torch.zeros(40)
        optimizer.step()
        bumps.append(float((curvature * p.detach() ** 2).sum() / 2))
    expected = predicted_loss_bump(0.5, float(curvature.sum()), 40)
    spread = math.sqrt(float((curvature**2).sum()) / 2) * 0.25 / 40
    assert sum(bumps) / 1000 == pytest.approx(expected, abs=5 * spread / math.sqrt(1000))


CHAINS, LR, TEMPERATURE, CURVATURE = 4000, 0.4, 0.7, 1.3


def from_posterior(p):
    # e = 2 lr / n with n = 10 samples and beta = 1 / (10 T).
    return SGLD.from_posterior([p], 2 * LR * TEMPERATURE, 10, beta=1 / (10 * TEMPERATURE))


def with_prior(p):
    return SGLD([p], LR, temperature=TEMPERATURE, weight_decay=0.3)


PARAMETERISATIONS = {
    "temperature": (lambda p: SGLD([p], LR, temperature=TEMPERATURE), CURVATURE),
    "posterior": (from_posterior, CURVATURE),
    "prior as weight decay": (with_prior, CURVATURE - 0.3),
    "energy": (
        lambda p: ASGLD([p], LR, mode="constant", noise_radius=math.sqrt(2 * LR * TEMPERATURE * CHAINS)),
        CURVATURE,
    ),
    "coordinate": (
        lambda p: ASGLD(
            [p], LR, mode="constant", noise_radius=math.sqrt(2 * LR * TEMPERATURE), noise_scale="coordinate"
        ),
        CURVATURE,
    ),
}


@pytest.mark.parametrize("name", PARAMETERISATIONS)
def test_the_stationary_variance_of_sgld(name):
    """Each coordinate is a chain of its own; squares decorrelate as rho^2 = (1 - lr lambda)^4 a step."""
    make, curvature = PARAMETERISATIONS[name]
    p = torch.zeros(CHAINS, requires_grad=True)
    optimizer = make(p)
    total, kept = 0.0, 150
    for step in range(30 + kept):
        p.grad = curvature * p.detach()
        optimizer.step()
        total += float(p.detach().double().square().mean()) if step >= 30 else 0.0
    expected = stationary_variance(CURVATURE, LR, TEMPERATURE)
    correlation = (1 - LR * CURVATURE) ** 2
    error = expected * math.sqrt(2 / (CHAINS * kept) * (1 + correlation) / (1 - correlation))
    assert total / kept == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_momentum_free_noise_adds_to_mini_batch_noise(sigma):
    """With gradient noise of variance sigma^2 the temperature rises by lr sigma^2 / 2."""
    p, generator = torch.zeros(CHAINS, requires_grad=True), torch.Generator().manual_seed(0)
    optimizer = SGLD([p], LR, temperature=TEMPERATURE)
    total = 0.0
    for step in range(180):
        p.grad = CURVATURE * p.detach() + sigma * torch.randn(CHAINS, generator=generator)
        optimizer.step()
        total += float(p.detach().double().square().mean()) if step >= 30 else 0.0
    expected = stationary_variance(CURVATURE, LR, TEMPERATURE + LR * sigma**2 / 2)
    correlation = (1 - LR * CURVATURE) ** 2
    error = expected * math.sqrt(2 / (CHAINS * 150) * (1 + correlation) / (1 - correlation))
    assert total / 150 == pytest.approx(expected, abs=4 * error)
