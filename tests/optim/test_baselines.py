"""The baselines: one kick at the start, SAM, NEON."""

import copy
import math

import pytest
import torch
from torch import nn

from limbeck.errors import ConfigError
from limbeck.optim import NEON, SAM, SGLD, jitter_
from limbeck.optim.sam import uphill


def saddle(p):
    """Minima at p[0] = +-1, of value -0.25."""
    return -(p[0] ** 2) / 2 + p[0] ** 4 / 4 + (p[1:] ** 2).sum() / 2


def closure_for(optimizer, p, f=saddle, counts=None):
    def closure():
        optimizer.zero_grad()
        loss = f(p)
        loss.backward()
        if counts is not None:
            counts.append(float(loss))
        return loss

    return closure


def test_one_kick_has_its_radius_and_comes_back_with_its_seed():
    moved = []
    for seed in (1, 1, 2):
        model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
        before = copy.deepcopy(model)
        jitter_(model.named_parameters(), 0.5, seed)
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        moved.append(torch.cat([(after - start).detach().flatten() for after, start in pairs]))
    assert float(moved[0].norm()) == pytest.approx(0.5, rel=0.06)
    assert torch.allclose(moved[0], moved[1], atol=1e-6)
    assert abs(float(torch.corrcoef(torch.stack([moved[0], moved[2]]))[0, 1])) < 0.1


def test_one_kick_leaves_what_is_frozen_and_draws_anew_each_time():
    kept, frozen = torch.zeros(3000, requires_grad=True), torch.zeros(500)
    jitter_([kept, frozen], 1.0)
    assert float(kept.detach().norm()) == pytest.approx(1.0, rel=0.1)
    assert not frozen.any()
    first = kept.detach().clone()
    jitter_([kept], 1.0)
    assert abs(float(torch.corrcoef(torch.stack([first, kept.detach() - first]))[0, 1])) < 0.1
    jitter_([], 1.0)


def test_one_kick_lets_sgd_leave_an_exact_saddle():
    p = torch.zeros(5, requires_grad=True)
    jitter_([p], 1e-3, seed=0)
    optimizer = torch.optim.SGD([p], 0.1)
    for _ in range(300):
        optimizer.step(closure_for(optimizer, p))
    assert abs(float(p.detach()[0])) == pytest.approx(1.0, abs=0.01)


def test_sam_takes_the_gradient_uphill():
    p, q = torch.tensor([0.5, -1.0, 2.0], requires_grad=True), torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    sam, plain = SAM(torch.optim.SGD([p], 0.1, momentum=0.9), rho=0.3), torch.optim.SGD([q], 0.1, momentum=0.9)
    for _ in range(4):
        sam.step(closure_for(sam, p))
        (slope,) = torch.autograd.grad(saddle(q), q)
        there = (q.detach() + 0.3 * slope / slope.norm()).requires_grad_()
        (q.grad,) = torch.autograd.grad(saddle(there), there)
        plain.step()
    assert torch.allclose(p, q, atol=1e-6)
    assert len(sam.state) == 1


def test_sam_at_a_gradient_of_zero_is_its_optimizer():
    p = torch.zeros(3, requires_grad=True)
    sam = SAM(torch.optim.SGD([p], 0.1))
    assert float(sam.step(closure_for(sam, p))) == 0.0
    assert not p.detach().any()
    assert uphill([], [], 1.0) == []


def test_sam_saves_and_copies_as_its_optimizer():
    p = torch.ones(3, requires_grad=True)
    sam = SAM(torch.optim.SGD([p], 0.1, momentum=0.9), rho=0.1)
    sam.step(closure_for(sam, p))
    q, twin = copy.deepcopy((p, sam))
    twin.load_state_dict(copy.deepcopy(sam.state_dict()))
    sam.step(closure_for(sam, p))
    twin.step(closure_for(twin, q))
    assert torch.equal(p, q)


def test_sam_runs_hooks_and_takes_a_new_state_as_any_optimizer():
    p, said = torch.ones(3, requires_grad=True), []
    sam = SAM(torch.optim.SGD([p], 0.1, momentum=0.9))
    sam.register_state_dict_pre_hook(lambda optimizer: said.append("saving"))
    sam.register_load_state_dict_post_hook(lambda optimizer: said.append("loaded"))
    sam.register_step_post_hook(lambda optimizer, args, kwargs: said.append("stepped"))
    sam.step(closure_for(sam, p))
    sam.load_state_dict(sam.state_dict())
    assert said == ["stepped", "saving", "loaded"]
    sam.state = {}
    assert sam.optimizer.state == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_kick_below_the_rounding_step_is_not_lost(dtype):
    p = torch.ones(100_000, dtype=dtype, requires_grad=True)
    radius = 0.05  # A coordinate moves by 1.6e-4, where the rounding step is 1e-3 or 8e-3.
    jitter_([p], radius, seed=1)
    moved = p.detach().double() - 1
    assert 0.005 < float(moved.ne(0).double().mean()) < 0.5
    assert abs(float(moved.mean())) < 4 * float(moved.std()) / 100_000**0.5


def test_neon_leaves_an_exact_saddle_in_one_step_that_costs_its_search():
    p, counts = torch.zeros(6, requires_grad=True), []
    settings = {"grad_threshold": 0.01, "noise_radius": 1e-3, "escape_distance": 0.1}
    optimizer = NEON([p], 0.3, search_steps=100, seed=1, **settings)
    optimizer.step(closure_for(optimizer, p, counts=counts))
    assert float(p.detach().norm()) == pytest.approx(0.1, rel=1e-3)
    assert abs(float(p.detach()[0])) > 0.09
    # The way down grows by 1 + lr a gradient; its share of the start is of the order r / sqrt(6).
    expected = math.log(0.1 / (1e-3 / math.sqrt(6))) / math.log1p(0.3)
    assert len(counts) == pytest.approx(expected, abs=12)
    for _ in range(60):
        optimizer.step(closure_for(optimizer, p))
    assert abs(float(p.detach()[0])) == pytest.approx(1.0, abs=0.01)


def test_neon_takes_the_side_with_the_lower_loss():
    def tilted(p):
        return saddle(p) + 1e-4 * p[0]

    for seed in range(4):
        p = torch.zeros(4, requires_grad=True)
        settings = {"grad_threshold": 0.01, "noise_radius": 1e-3, "escape_distance": 0.2}
        optimizer = NEON([p], 0.3, seed=seed, **settings)
        optimizer.step(closure_for(optimizer, p, tilted))
        assert float(p.detach()[0]) < -0.1


def test_neon_at_a_minimum_finds_no_way_and_descends():
    p = torch.full((4,), 1e-4).requires_grad_()
    settings = {"grad_threshold": 0.01, "noise_radius": 1e-3, "escape_distance": 0.2}
    optimizer = NEON([p], 0.3, search_steps=20, seed=1, **settings)
    optimizer.step(closure_for(optimizer, p, lambda p: (p**2).sum() / 2))
    assert torch.allclose(p.detach(), torch.full((4,), 0.7e-4))
    assert optimizer.param_groups[0]["searches"] == 1


def test_what_cannot_work_is_refused():
    p = torch.zeros(3, requires_grad=True)
    with pytest.raises(ConfigError, match="rho is -1"):
        SAM(torch.optim.SGD([p], 0.1), rho=-1)
    with pytest.raises(ConfigError, match="closure"):
        SAM(torch.optim.SGD([p], 0.1)).step()
    good = {"grad_threshold": 0.01, "noise_radius": 1e-3, "escape_distance": 0.2}
    with pytest.raises(ConfigError, match="closure"):
        NEON([p], 0.1, **good).step()
    for wrong in ({"noise_radius": 0.5}, {"search_steps": 0}, {"grad_threshold": -1.0}):
        with pytest.raises(ConfigError, match="NEON"):
            NEON([p], 0.1, **{**good, **wrong})
    with pytest.raises(ConfigError, match="seed"):
        jitter_([p], 1.0, seed=0.5)
    for radius in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="noise_radius"):
            jitter_([p], radius)
    neon, q = NEON([p], 0.1, **good), torch.zeros(2, requires_grad=True)
    with pytest.raises(ConfigError, match="one group"):
        neon.add_param_group({"params": [q]})
    assert len(neon.param_groups) == 1
    with pytest.raises(ConfigError, match="whole and real"):
        NEON([torch.zeros(2, dtype=torch.complex64, requires_grad=True)], 0.1, **good)


def test_sam_over_a_sampler_keeps_its_noise_step():
    p = torch.ones(3, requires_grad=True)
    sam = SAM(SGLD([p], 0.1, temperature=0.1, seed=1))
    sam.step(closure_for(sam, p))
    assert sam.param_groups[0]["noise_step"] == 1
