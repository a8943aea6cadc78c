"""Noise is independent where nothing ties it together, and the same where one seed does."""

import copy

import numpy
import pytest
import torch
from torch import nn

from limbeck.errors import ConfigError
from limbeck.optim import AGLD, ASG, ASGLD, PSGLD, SGLD, NoisySGD, Perturb, PerturbedGD, PerturbedSGD
from limbeck.optim.block import noise_names

MAKERS = {
    "ASGLD": lambda p, **k: ASGLD(p, 0.1, mode="constant", noise_radius=1.0, **k),
    "AGLD": lambda p, **k: AGLD(p, 0.1, grad_threshold=9.0, noise_radius=1.0, escape_steps=0, **k),
    "SGLD": lambda p, **k: SGLD(p, 0.1, temperature=1.0, **k),
    "PSGLD": lambda p, **k: PSGLD(p, 0.1, temperature=1.0, eps=0.1, **k),
    "PerturbedGD": lambda p, **k: PerturbedGD(p, 0.1, grad_threshold=9.0, noise_radius=1.0, escape_steps=0, **k),
    "PerturbedSGD": lambda p, **k: PerturbedSGD(p, 0.1, noise_radius=1.0, **k),
    "NoisySGD": lambda p, **k: NoisySGD(p, 0.1, **k),
    "Perturb": lambda p, **k: Perturb(torch.optim.SGD(p, 0.1), mode="constant", noise_radius=1.0, **k),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
LIMIT = 5 / 3000**0.5
"""Five standard errors of the correlation of two independent samples of 3,000."""


def noise_of(make, params, steps=1, **settings):
    """What `steps` steps with gradients of 0 add to each tensor, in a row."""
    optimizer = make(params, **settings)
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in tensors]
    for _ in range(steps):
        for p in tensors:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    return [(p.detach() - start).flatten() for p, start in zip(tensors, before, strict=True)]


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def zeros(count=1):
    return [torch.zeros(60, 50, requires_grad=True) for _ in range(count)]


@makers
def test_two_optimizers_are_independent_by_default(make):
    (first,), (second,) = noise_of(make, zeros()), noise_of(make, zeros())
    assert abs(correlation(first, second)) < LIMIT


@makers
def test_the_global_seed_makes_the_default_noise_come_back(make):
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(noise_of(make, zeros())[0])
    assert torch.equal(runs[0], runs[1])
    assert abs(correlation(runs[0], runs[2])) < LIMIT


@makers
def test_a_given_seed_does_not_look_at_the_global_one(make):
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        runs.append(noise_of(make, zeros(), seed=11)[0])
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*runs)


@makers
@pytest.mark.parametrize("networks", [2, 3])
def test_networks_with_equal_names_in_one_optimizer_are_independent(make, networks):
    layers = [nn.Linear(50, 60, bias=False) for _ in range(networks)]
    moved = noise_of(make, [{"params": list(layer.named_parameters())} for layer in layers])
    for i in range(networks):
        for j in range(i):
            assert abs(correlation(moved[i], moved[j])) < LIMIT


@makers
def test_equal_names_in_one_group_are_independent_too(make):
    first, second = zeros(2)
    a, b = noise_of(make, [("weight", first), ("weight", second)])
    assert abs(correlation(a, b)) < LIMIT


def test_a_name_that_occurs_once_keys_the_noise_by_itself_whatever_stands_before_it():
    alone = noise_of(MAKERS["SGLD"], [("b", zeros()[0])], seed=5)
    beside = noise_of(MAKERS["SGLD"], [("a", zeros()[0]), ("a", zeros()[0]), ("b", zeros()[0])], seed=5)
    assert torch.equal(alone[0], beside[2])


def test_no_two_noise_names_are_alike():
    a, b, c = zeros(3)
    names = noise_names([{"params": [a, b], "param_names": ["w", "w"]}, {"params": [c], "param_names": ["w"]}])
    assert len({name for group in names for name in group}) == 3
    assert names[0][0] == "w"
    assert noise_names([{"params": [a, b]}, {"params": [c]}]) == [["0", "1"], ["2"]]
    # A parameter that somebody appended to a group with names has its position.
    assert noise_names([{"params": [a, b], "param_names": ["w"]}]) == [["w", "1"]]


@makers
def test_steps_are_independent(make):
    once, twice = (noise_of(make, zeros(), steps=steps, seed=3)[0] for steps in (1, 2))
    assert abs(correlation(once, twice - once)) < LIMIT


@makers
def test_the_drawn_seed_lies_in_every_checkpoint_and_goes_on(make):
    (p,) = zeros()
    optimizer = make([p])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    (q,) = zeros()
    q.data.copy_(p.data)
    other = make([q])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(other.param_groups[0]["seed"], int)
    for tensor, stepper in ((p, optimizer), (q, other)):
        tensor.grad = torch.zeros_like(tensor)
        stepper.step()
    assert torch.equal(p, q)


@makers
@pytest.mark.parametrize("seed", [1.5, "3", True, [1], torch.tensor(0.5)], ids=repr)
def test_a_seed_that_cannot_work_is_refused_when_it_is_given(make, seed):
    with pytest.raises(ConfigError, match=r"seed is .*; give a whole number"):
        make(zeros(), seed=seed)


def test_whole_numbers_of_any_kind_are_seeds():
    for seed in (-3, 2**70, numpy.int64(4), torch.tensor(7)):
        optimizer = SGLD(zeros(), 0.1, temperature=1.0, seed=seed)
        assert type(optimizer.param_groups[0]["seed"]) is int
        optimizer.param_groups[0]["params"][0].grad = torch.zeros(60, 50)
        optimizer.step()


def test_a_seed_of_one_group_is_checked_as_well():
    optimizer = ASGLD(zeros(), 0.1, mode="constant", noise_radius=1.0)
    with pytest.raises(ConfigError, match="seed"):
        optimizer.add_param_group({"params": zeros(), "seed": 0.5})
    assert len(optimizer.param_groups) == 1


def test_an_optimizer_without_noise_draws_no_seed():
    state = torch.get_rng_state()
    ASG(zeros(), 0.1, grad_threshold=1.0)
    assert torch.equal(torch.get_rng_state(), state)
