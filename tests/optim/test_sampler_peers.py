"""Samplers beside those of posteriors and blackjax: on a Gaussian and a banana, moments within Monte Carlo error.

Both are optional (pip install posteriors blackjax); what is not installed is skipped.
"""

import math

import numpy as np
import pytest
import torch

from limbeck.optim import SGHMC, SGLD, SGNHT, CyclicalSampling

pytestmark = pytest.mark.slow
CHAINS, T = 1500, 0.7
H, ALPHA = 0.05, 1.5


def gaussian(x):
    return x[..., 0] ** 2 + 0.25 * x[..., 1] ** 2


def banana(x):
    return 0.5 * x[..., 0] ** 2 + (x[..., 1] - x[..., 0] ** 2) ** 2


# On the banana only SGLD, whose rule is the same everywhere: blackjax's others, which move x by the old velocity, are
# 15 to 30 % too cold there at this step. Ours are held to the closed form below.
cases = pytest.mark.parametrize(
    ("name", "potential"), [("SGLD", gaussian), ("SGLD", banana), ("SGHMC", gaussian), ("SGNHT", gaussian)]
)
STEPS = {"SGLD": (1500, 1500), "SGHMC": (600, 1000), "SGNHT": (600, 1000)}
OURS = {
    "SGLD": lambda p: SGLD(p, 0.01, temperature=T, seed=3),
    "SGHMC": lambda p: SGHMC(p, H**2, temperature=T, friction=H * ALPHA, seed=3),
    "SGNHT": lambda p: SGNHT(p, H**2, temperature=T, diffusion=H * ALPHA, seed=3),
}


def chain_moments(points, skip, steps):
    """[chains, 4]: each chain's means of x, y, x^2, y^2 over the steps after the skipped ones."""
    total = torch.zeros(CHAINS, 4, dtype=torch.float64)
    for step in range(skip + steps):
        x = next(points)
        if step >= skip:
            total += torch.cat([x, x**2], 1).double()
    return total / steps


def ours(name, potential):
    x = torch.zeros(CHAINS, 2, requires_grad=True)
    optimizer = OURS[name]([x])
    while True:
        optimizer.zero_grad()
        potential(x).sum().backward()
        optimizer.step()
        yield x.detach()


def assert_alike(mine, theirs, allowance):
    """Means that differ by at most four standard errors and the share that different step rules may make."""
    error = ((mine.var(0) + theirs.var(0)) / CHAINS).sqrt()
    gap = (mine.mean(0) - theirs.mean(0)).abs()
    assert (gap <= 4 * error + allowance * theirs.mean(0).abs()).all(), (mine.mean(0), theirs.mean(0), error)


@cases
def test_posteriors_has_the_same_moments(name, potential):
    posteriors = pytest.importorskip("posteriors", reason="posteriors is not installed")
    samplers = {
        "SGLD": lambda f: posteriors.sgmcmc.sgld.build(f, 0.01, temperature=T),
        "SGHMC": lambda f: posteriors.sgmcmc.sghmc.build(f, H, alpha=ALPHA, temperature=T),
        "SGNHT": lambda f: posteriors.sgmcmc.sgnht.build(f, H, alpha=ALPHA, temperature=T),
    }

    def theirs():
        sampler = samplers[name](lambda params, batch: (-potential(params["x"]).sum(), torch.tensor([])))
        state = sampler.init({"x": torch.zeros(CHAINS, 2)})
        while True:
            state, _ = sampler.update(state, None)
            yield state.params["x"]

    torch.manual_seed(0)
    # SGLD is the same rule; posteriors' SGHMC and SGNHT move x by the old velocity, which is warmer by O(h).
    allowance = 0.01 if name == "SGLD" else 0.08
    assert_alike(chain_moments(ours(name, potential), *STEPS[name]), chain_moments(theirs(), *STEPS[name]), allowance)


@cases
def test_blackjax_has_the_same_moments(name, potential):
    blackjax = pytest.importorskip("blackjax", reason="blackjax is not installed")
    import jax

    slope = jax.vmap(jax.grad(lambda x: -potential(x) / T))
    # blackjax samples exp(log-density) itself: a temperature is the density's, and time is scaled by it.
    make, step_size = {
        "SGLD": (lambda: blackjax.sgld(lambda x, batch: slope(x)), 0.01 * T),
        "SGHMC": (lambda: blackjax.sghmc(lambda x, batch: slope(x), 20, ALPHA), H * math.sqrt(T)),
        "SGNHT": (lambda: blackjax.sgnht(lambda x, batch: slope(x), ALPHA), H * math.sqrt(T)),
    }[name]

    def theirs():
        sampler = make()
        key = (jax.random.key(1),) if name == "SGNHT" else ()
        state = sampler.init(jax.numpy.zeros((CHAINS, 2)), *key)
        move = jax.jit(lambda key, state: sampler.step(key, state, None, step_size))
        for key in jax.random.split(jax.random.key(0), 10_000):
            state = move(key, state)
            yield torch.from_numpy(np.array(getattr(state, "position", state)))

    allowance = 0.01 if name == "SGLD" else 0.08
    assert_alike(chain_moments(ours(name, potential), *STEPS[name]), chain_moments(theirs(), *STEPS[name]), allowance)


@pytest.mark.parametrize("name", OURS)
def test_the_banana_has_its_closed_form(name):
    """x is normal with variance T, and y - x^2 with variance T / 2: E y = E x^2 = T, E y^2 = T/2 + 3 T^2."""
    found = chain_moments(ours(name, banana), *STEPS[name]).mean(0).tolist()
    assert found[:3] == pytest.approx([0.0, T, T], abs=0.06)
    assert found[3] == pytest.approx(T / 2 + 3 * T**2, rel=0.1)


def test_cyclical_sampling_finds_the_other_mode_where_a_chain_of_sgld_stays():
    """exp(-f / T) with a third of its mass in the left well, where all chains start; half leave in 20 cycles."""

    def potential(x):
        wells = torch.stack([math.log(1 / 3) - 8 * (x + 1.5) ** 2, math.log(2 / 3) - 8 * (x - 1.5) ** 2])
        return -torch.logsumexp(wells, 0)

    shares = {}
    for name in ("SGLD", "cSGLD"):
        x = torch.full((CHAINS,), -1.5, requires_grad=True)
        optimizer = SGLD([x], 0.01 if name == "SGLD" else 0.12, temperature=1.0, seed=1)
        schedule = CyclicalSampling(optimizer, 200, exploration_fraction=0.0) if name == "cSGLD" else None
        right, taken = 0.0, 0
        for step in range(4000):
            optimizer.zero_grad()
            potential(x).sum().backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if step >= 2000 and step % 200 >= 150:
                right, taken = right + float((x.detach() > 0).float().mean()), taken + 1
        shares[name] = right / taken
    assert shares["SGLD"] < 0.2
    assert 0.4 < shares["cSGLD"] < 2 / 3 + 0.05
