"""Samplers are judged by the distribution that they draw from."""

import math

import numpy as np
import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.optim import PSGLD, SGHMC, SGLD, SGNHT, CyclicalSampling
from limbeck.optim.theory import stationary_variance

CHAINS, T = 3000, 0.3
MAKERS = {
    "SGLD": lambda p, lr=0.02, **k: SGLD(p, lr, temperature=T, seed=1, **k),
    "SGHMC": lambda p, lr=0.005, **k: SGHMC(p, lr, temperature=T, friction=0.2, seed=1, **k),
    "SGNHT": lambda p, lr=0.005, **k: SGNHT(p, lr, temperature=T, diffusion=0.2, seed=1, **k),
    "PSGLD": lambda p, lr=0.01, **k: PSGLD(p, lr, temperature=T, eps=0.1, adapt_steps=300, seed=1, **k),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def second_moment(optimizer, x, gradient, skip, steps):
    """Mean of x^2 over chains and steps."""
    total = torch.zeros_like(x, dtype=torch.float64)
    for step in range(skip + steps):
        x.grad = gradient(x.detach())
        optimizer.step()
        if step >= skip:
            total += x.detach().double().square()
    return total / steps


@makers
def test_a_gaussian_has_its_variance(make):
    x = torch.randn(CHAINS, generator=torch.Generator().manual_seed(0)).mul(0.5).requires_grad_()
    found = second_moment(make([x]), x, lambda x: 2 * x, 600, 600)
    assert float(found.mean()) == pytest.approx(T / 2, rel=0.05)


@makers
def test_a_quartic_has_its_second_moment(make):
    """exp(-x^4 / (4 T)):  E x^2 = 2 sqrt(T) Gamma(3/4) / Gamma(1/4). No linear recursion has this law."""
    x = torch.randn(CHAINS, generator=torch.Generator().manual_seed(0)).mul(0.5).requires_grad_()
    found = second_moment(make([x]), x, lambda x: x**3, 800, 800)
    expected = 2 * math.sqrt(T) * math.gamma(0.75) / math.gamma(0.25)
    assert float(found.mean()) == pytest.approx(expected, rel=0.06)


def test_curvatures_a_hundredfold_apart_each_have_their_variance_under_a_preconditioner():
    curvature = torch.cat([torch.full((1500,), 0.3), torch.full((1500,), 30.0)])
    x = (torch.randn(3000, generator=torch.Generator().manual_seed(0)) / curvature.sqrt()).requires_grad_()
    x.data.mul_(math.sqrt(T))
    optimizer = PSGLD([x], 0.005, temperature=T, alpha=0.99, eps=0.1, adapt_steps=300, seed=2)
    found = second_moment(optimizer, x, lambda x: curvature * x, 900, 900)
    for part, own in ((found[:1500], 0.3), (found[1500:], 30.0)):
        assert float(part.mean()) == pytest.approx(T / own, rel=0.08)


@pytest.mark.parametrize("correction", [True, False])
def test_a_preconditioner_that_never_settles_has_the_bias_that_its_docstring_tells(correction):
    x = torch.randn(800, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    optimizer = PSGLD([x], 0.002, temperature=T, alpha=0.99, eps=0.1, adapt_steps=None, correction=correction, seed=2)
    total = 0.0
    for step in range(2400):
        x.grad = None
        (x**2 / 2).sum().backward(create_graph=correction)
        optimizer.step()
        total += float(x.detach().square().mean()) if step >= 1800 else 0.0
    assert total / 600 == pytest.approx(0.44, abs=0.03)


def test_the_preconditioner_of_a_parameter_that_joins_late_settles_on_its_own_gradients():
    early, late = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = PSGLD([early, late], 1e-4, temperature=1e-9, eps=0.1, adapt_steps=5, seed=1)
    for step in range(12):
        early.grad = torch.ones(3)
        late.grad = torch.full((3,), 2.0) if step >= 8 else None
        optimizer.step()
    assert optimizer.state[early]["square_avg_steps"] == 5
    assert optimizer.state[late]["square_avg_steps"] == 4
    root = (optimizer.state[late]["square_avg"] / optimizer.state[late]["square_avg_weight"]).sqrt()
    assert torch.allclose(root, torch.full((3,), 2.0))


@pytest.mark.parametrize("friction", [0.05, 0.3, 1.0])
def test_sghmc_has_the_stationary_variance_of_its_recursion(friction):
    lr, curvature = 0.05, 1.7
    x = torch.zeros(CHAINS, requires_grad=True)
    optimizer = SGHMC([x], lr, temperature=T, friction=friction, seed=5)
    found = second_moment(optimizer, x, lambda x: curvature * x, 200, 400)
    step = np.array([[1 - lr * curvature, 1 - friction], [-lr * curvature, 1 - friction]])
    noise = 2 * friction * lr * T * np.ones((2, 2))
    covariance = np.linalg.solve(np.eye(4) - np.kron(step, step), noise.ravel()).reshape(2, 2)
    assert float(found.mean()) == pytest.approx(covariance[0, 0], rel=0.05)


def test_sghmc_that_is_told_of_the_gradient_noise_does_not_heat():
    lr, friction, sigma = 0.02, 0.3, 2.0
    generator = torch.Generator().manual_seed(3)

    def gradient(x):
        return x + sigma * torch.randn(CHAINS, generator=generator)

    told = lr * sigma**2 / (2 * T)
    variances = []
    for estimate in (0.0, told):
        x = torch.zeros(CHAINS, requires_grad=True)
        optimizer = SGHMC([x], lr, temperature=T, friction=friction, gradient_noise=estimate, seed=5)
        variances.append(float(second_moment(optimizer, x, gradient, 200, 400).mean()))
    assert variances[0] > 1.25 * T
    assert variances[1] == pytest.approx(T, rel=0.06)


def test_the_thermostat_takes_in_gradient_noise_that_it_was_not_told_of():
    lr, sigma = 0.02, 2.0
    generator = torch.Generator().manual_seed(3)
    x = torch.zeros(CHAINS, requires_grad=True)
    optimizer = SGNHT([x], lr, temperature=T, diffusion=0.1, seed=5)
    gradient = lambda x: x + sigma * torch.randn(CHAINS, generator=generator)  # noqa: E731
    found = second_moment(optimizer, x, gradient, 400, 500)
    assert float(found.mean()) == pytest.approx(T, rel=0.06)
    # lr V / (2 T) of friction for the gradients' noise, beside the diffusion.
    assert optimizer.param_groups[0]["thermostat"] == pytest.approx(0.1 + lr * sigma**2 / (2 * T), rel=0.15)


@pytest.mark.parametrize("name", ["SGLD", "SGHMC"])
def test_bfloat16_parameters_are_no_hotter_than_float32_ones(name):
    """At 1 the rounding step of bfloat16 is 0.004 to 0.008, as large as the noise of a step."""
    variances = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(CHAINS, dtype=dtype, requires_grad=True)
        kind = {"SGLD": SGLD, "SGHMC": lambda *a, **k: SGHMC(*a, friction=0.5, **k)}[name]
        optimizer = kind([x], 2e-2, temperature=5e-4, seed=1)
        centred, total = lambda x: x - 1, 0.0
        for step in range(500):
            x.grad = centred(x.detach())
            optimizer.step()
            values = optimizer.state[x].get("master", x.detach()).double()
            total += float((values - 1).square().mean()) if step >= 200 else 0.0
        variances[dtype] = total / 300
    assert variances[torch.bfloat16] == pytest.approx(variances[torch.float32], rel=0.05)
    assert variances[torch.float32] == pytest.approx(5e-4, rel=0.08)


def test_sgld_resumes_its_float32_masters():
    def make(p):
        return SGLD([p], 1e-3, temperature=1e-4, seed=4)

    def run(optimizer, p, steps):
        for _ in range(steps):
            p.grad = p.detach() - 0.5
            optimizer.step()

    whole = torch.ones(50, dtype=torch.bfloat16, requires_grad=True)
    run(make(whole), whole, 9)
    cut = torch.ones(50, dtype=torch.bfloat16, requires_grad=True)
    optimizer = make(cut)
    run(optimizer, cut, 4)
    again = cut.detach().clone().requires_grad_()
    resumed = make(again)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[again]["master"].dtype is torch.float32
    run(resumed, again, 5)
    assert torch.equal(whole, again)


@makers
def test_samples_end_with_noise_steps(make):
    x = torch.zeros(50, requires_grad=True)
    optimizer = make([x], noise_steps=2)
    norms = []
    for _ in range(4):
        x.grad = torch.zeros(50)
        optimizer.step()
        norms.append(float(optimizer.stats()["noise_norm"]))
    assert [norm > 0 for norm in norms] == [True, True, False, False]


@makers
def test_a_group_at_rate_zero_stays_beside_one_that_moves(make):
    still, moving = torch.ones(20, requires_grad=True), torch.ones(20, requires_grad=True)
    optimizer = make([{"params": [still], "lr": 0.0}, {"params": [moving]}])
    for _ in range(3):
        still.grad, moving.grad = torch.ones(20), torch.ones(20)
        optimizer.step()
    assert torch.equal(still.detach(), torch.ones(20))
    assert not torch.equal(moving.detach(), torch.ones(20))
    assert [group["noise_step"] for group in optimizer.param_groups] == [3, 3]


@makers
def test_maximize_samples_the_mirror_image(make):
    up, down = torch.zeros(40, requires_grad=True), torch.zeros(40, requires_grad=True)
    first, second = make([up], maximize=True), make([down])
    for _ in range(5):
        up.grad, down.grad = -(up.detach() - 0.3), down.detach() - 0.3
        first.step()
        second.step()
    assert torch.equal(up, down)


def test_a_cycle_explores_without_noise_and_then_samples():
    x = torch.zeros(30, requires_grad=True)
    optimizer = SGLD([x], 0.4, temperature=2.0, seed=1)
    schedule = CyclicalSampling(optimizer, cycle_steps=8, exploration_fraction=0.25)
    rates, temperatures, samples = [], [], []
    for _ in range(16):
        rates.append(optimizer.param_groups[0]["lr"])
        temperatures.append(optimizer.param_groups[0]["temperature"])
        samples.append(schedule.is_sampling)
        x.grad = torch.zeros(30)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.2 * (1 + math.cos(math.pi * (k % 8) / 8)) for k in range(16)])
    assert temperatures == [0.0, 0.0, *[2.0] * 6] * 2
    assert samples == [temperature > 0 for temperature in temperatures]


def test_a_cycle_resumes_where_it_was():
    def make():
        x = torch.zeros(30, requires_grad=True)
        optimizer = SGHMC([x], 0.4, temperature=2.0, friction=0.5, seed=1)
        return x, optimizer, CyclicalSampling(optimizer, cycle_steps=6, exploration_fraction=0.5)

    def run(x, optimizer, schedule, steps):
        for _ in range(steps):
            x.grad = x.detach() - 1
            optimizer.step()
            schedule.step()

    whole = make()
    run(*whole, 14)
    cut = make()
    run(*cut, 4)
    again = make()
    again[0].data.copy_(cut[0].data)
    again[1].load_state_dict(cut[1].state_dict())
    again[2].load_state_dict(cut[2].state_dict())
    run(*again, 10)
    assert torch.equal(whole[0], again[0])


def test_cycles_find_both_modes_of_two_that_sgld_does_not_cross():
    """f = (x^2 - 4)^2 / 16 at T = 0.05: the barrier is 20 T."""
    x = torch.full((400,), 2.0).requires_grad_()
    optimizer = SGHMC([x], 0.3, temperature=0.6, friction=0.2, seed=1)
    schedule = CyclicalSampling(optimizer, cycle_steps=40, exploration_fraction=0.0)
    for _ in range(400):
        x.grad = x.detach() * (x.detach() ** 2 - 4) / 4
        optimizer.step()
        schedule.step()
    assert 0.25 < float((x.detach() > 0).float().mean()) < 0.75


@pytest.mark.parametrize("wrong", [{"cycle_steps": 0}, {"cycle_steps": 5, "exploration_fraction": 1.0}])
def test_cycles_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError, match="CyclicalSampling"):
        CyclicalSampling(SGLD([torch.zeros(2, requires_grad=True)], 0.1, temperature=1.0), **wrong)


def test_cycles_need_a_temperature():
    with pytest.raises(ConfigError, match="SGD has no temperature"):
        CyclicalSampling(torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1), 5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: SGHMC(p, 0.1, temperature=1.0, friction=0.0), "friction is 0.0"),
        (lambda p: SGHMC(p, 0.1, temperature=1.0, friction=1.5), "friction is 1.5"),
        (lambda p: SGHMC(p, 0.1, temperature=1.0, friction=0.1, gradient_noise=0.2), "gradient_noise is 0.2"),
        (lambda p: SGNHT(p, 0.1, temperature=1.0, diffusion=0.0), "diffusion is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make([torch.zeros(2, requires_grad=True)])


def test_the_variance_of_sgld_at_a_long_step_is_the_closed_form():
    x = torch.zeros(CHAINS, requires_grad=True)
    found = second_moment(SGLD([x], 0.9, temperature=T, seed=3), x, lambda x: 1.2 * x, 30, 200)
    assert float(found.mean()) == pytest.approx(stationary_variance(1.2, 0.9, T), rel=0.04)


def test_one_step_of_sgld_is_that_of_posteriors():
    """posteriors.sgmcmc.sgld:  p + lr grad + sqrt(T lr (2 - T lr beta)) xi  with beta 0, grad of the log-posterior."""
    lr, temperature, gradient = 0.03, 0.7, torch.linspace(-1, 1, 20_000)
    moved = []
    for slope in (torch.zeros(20_000), gradient):
        x = torch.zeros(20_000, requires_grad=True)
        x.grad = slope
        SGLD([x], lr, temperature=temperature, seed=4).step()
        moved.append(x.detach())
    assert torch.allclose(moved[1] - moved[0], lr * -gradient, atol=1e-6)
    assert float(moved[0].std()) == pytest.approx(math.sqrt(temperature * lr * 2), rel=0.02)


def test_one_step_of_sghmc_is_that_of_posteriors():
    """posteriors.sgmcmc.sghmc:  m + h grad - h alpha m + sqrt(2 alpha h T) xi;  v = h m, lr = h^2, friction = h alpha.

    Only its parameters move by the old m, and ours by the new v.
    """
    h, alpha, temperature, gradient = 0.1, 0.8, 0.7, torch.linspace(-1, 1, 20_000)
    momenta = torch.linspace(2, 3, 20_000)
    found = []
    for slope, start in ((torch.zeros(20_000), torch.zeros(20_000)), (gradient, momenta)):
        x = torch.zeros(20_000, requires_grad=True)
        x.grad = slope
        optimizer = SGHMC([x], h**2, temperature=temperature, friction=h * alpha, seed=4)
        optimizer.state[x]["velocity"] = h * start
        optimizer.step()
        found.append(optimizer.state[x]["velocity"] / h)
        assert torch.equal(x.detach(), optimizer.state[x]["velocity"])
    assert torch.allclose(found[1] - found[0], momenta + h * -gradient - h * alpha * momenta, atol=1e-5)
    assert float(found[0].std()) == pytest.approx(math.sqrt(2 * alpha * h * temperature), rel=0.02)
