"""Bit equality of the Langevin family with torch's SGD, and of its members with one another."""

import math

import pytest
import torch

from limbeck.optim import AGLD, ASG, ASGLD, SGLD, Perturb, PerturbedSGD


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 7), (130,), (), (5, 4, 3)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def objective(params):
    return sum((p.float().cos() * 0.5 + p.float() ** 2 * 0.3).sum() for p in params)


def run(make, steps=25, dtype=torch.float32):
    params = make_params(dtype)
    optimizer = make(params)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(params).backward()
        optimizer.step()
    return params, optimizer


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


SGD_SETTINGS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"maximize": True},
    {"maximize": True, "momentum": 0.8, "nesterov": True},
]


@pytest.mark.parametrize("settings", SGD_SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_asg_without_boost_is_sgd_bit_for_bit(settings, dtype):
    for foreach in (True, False, None):
        expected, _ = run(lambda p, f=foreach: torch.optim.SGD(p, 0.05, foreach=f, **settings), dtype=dtype)
        made, _ = run(
            lambda p, f=foreach: ASG(p, 0.05, grad_threshold=1e6, step_boost=1, foreach=f, **settings), dtype=dtype
        )
        assert_same_bits(made, expected)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"gate": "ema"}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("escape_steps", [None, 2])
def test_asgld_without_noise_is_asg_bit_for_bit(settings, escape_steps):
    shared = {"grad_threshold": 10.0, "escape_steps": escape_steps, "step_boost": 10.0, "boost_steps": 2, **settings}
    expected, asg = run(lambda p: ASG(p, 0.05, **shared))
    made, asgld = run(lambda p: ASGLD(p, 0.05, noise_radius=0.0, **shared))
    assert asg.param_groups[0]["fires"] == asgld.param_groups[0]["fires"] > 0
    assert_same_bits(made, expected)


def test_asgld_that_never_fires_is_sgd():
    expected, _ = run(lambda p: torch.optim.SGD(p, 0.05))
    made, optimizer = run(lambda p: ASGLD(p, 0.05, grad_threshold=1e-9))
    assert optimizer.param_groups[0]["fires"] == 0
    assert_same_bits(made, expected)


@pytest.mark.parametrize("lr, temperature", [(0.05, 0.3), (0.013, 1e-3), (0.1, 7.0)])
def test_constant_mode_is_sgld_draw_for_draw(lr, temperature):
    numel = sum(p.numel() for p in make_params())
    radius = math.sqrt(2 * lr * temperature * numel)
    expected, _ = run(lambda p: SGLD(p, lr, temperature=temperature, seed=5))
    made, _ = run(lambda p: ASGLD(p, lr, mode="constant", noise_radius=radius, seed=5))
    assert_same_bits(made, expected)


def test_perturbed_sgd_is_the_constant_mode_with_the_radius_in_units_of_the_gradient():
    expected, _ = run(lambda p: ASGLD(p, 0.05, mode="constant", noise_radius=0.05 * 0.4, seed=5))
    made, _ = run(lambda p: PerturbedSGD(p, 0.05, noise_radius=0.4, seed=5))
    assert_same_bits(made, expected)


@pytest.mark.parametrize("mode", ["gated", "smooth"])
def test_perturb_over_sgd_is_asgld(mode):
    settings = {"grad_threshold": 3.0, "noise_radius": 0.2, "escape_steps": 3, "mode": mode, "seed": 5}
    expected, _ = run(lambda p: AGLD(p, 0.05, momentum=0.9, **settings))
    made, optimizer = run(lambda p: Perturb(torch.optim.SGD(p, 0.05, momentum=0.9), **settings))
    assert optimizer.param_groups[0]["fires"] > 0
    assert_same_bits(made, expected)


def test_perturb_that_never_fires_is_the_bare_optimizer():
    expected, _ = run(lambda p: torch.optim.AdamW(p, 0.01))
    made, _ = run(lambda p: Perturb(torch.optim.AdamW(p, 0.01), grad_threshold=1e-9))
    assert_same_bits(made, expected)


@pytest.mark.parametrize("mode", ["gated", "smooth", "annealed", "constant"])
@pytest.mark.parametrize("noise", ["gaussian", "sphere", "ball"])
def test_loop_and_foreach_agree(mode, noise):
    settings = {"grad_threshold": 3.0, "noise_radius": 0.2, "mode": mode, "noise": noise, "momentum": 0.9, "seed": 5}
    expected, _ = run(lambda p: ASGLD(p, 0.05, foreach=False, **settings), steps=8)
    made, _ = run(lambda p: ASGLD(p, 0.05, foreach=True, **settings), steps=8)
    assert_same_bits(made, expected)
