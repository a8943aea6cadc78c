"""torch's own optimizer inputs (`torch.testing._internal.common_optimizers`), for every optimizer with noise."""

import copy

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_inputs_func_adamw, optim_inputs_func_sgd

from limbeck.optim import AGLD, ASG, ASGLD, PSGLD, SGHMC, SGLD, SGNHT, NoisySGD, Perturb, PerturbedGD, PerturbedSGD

GATE = {"grad_threshold": 1e3, "noise_radius": 1e-3, "escape_steps": 1, "seed": 1}
SHUT = {"grad_threshold": 1e-30, "seed": 1}
LANGEVIN = {
    "ASGLD": lambda p, **k: ASGLD(p, **GATE, **k),
    "ASGLD ema": lambda p, **k: ASGLD(p, gate="ema", **GATE, **k),
    "ASGLD auto": lambda p, **k: ASGLD(p, grad_threshold="auto", noise_radius=1e-3, seed=1, **k),
    "AGLD": lambda p, **k: AGLD(p, **GATE, **k),
    "ASG": lambda p, **k: ASG(p, grad_threshold=1e3, escape_steps=1, step_boost=2.0, **k),
}
SMALLER = {
    "PerturbedGD": (PerturbedGD, {**GATE}, ("momentum", "maximize")),
    "PerturbedSGD": (PerturbedSGD, {"noise_radius": 1e-3, "seed": 1}, ("momentum", "weight_decay", "maximize")),
    "NoisySGD": (NoisySGD, {"noise_radius": 1e-3, "seed": 1}, ("momentum", "weight_decay", "maximize")),
    "SGLD": (SGLD, {"temperature": 1e-6, "seed": 1}, ("weight_decay", "maximize")),
    "PSGLD": (PSGLD, {"temperature": 1e-6, "eps": 0.1, "seed": 1}, ("weight_decay", "maximize")),
    "SGHMC": (SGHMC, {"temperature": 1e-6, "seed": 1}, ("weight_decay", "maximize")),
    "SGNHT": (SGNHT, {"temperature": 1e-6, "seed": 1}, ("weight_decay", "maximize")),
}
"""Those that offer a part of torch's settings: class, what it needs, which of torch's it has."""


def sgd_inputs():
    for given in optim_inputs_func_sgd("cpu"):
        yield given.desc, {"lr": 1e-3, **given.kwargs}


def table():
    """Every optimizer with every one of torch's inputs that it has the settings for."""
    for desc, kwargs in sgd_inputs():
        for name, make in LANGEVIN.items():
            yield pytest.param(lambda p, make=make, k=kwargs: make(p, **k), id=f"{name}, {desc}")
        for name, (kind, own, has) in SMALLER.items():
            if set(kwargs) <= {"lr", *has}:
                yield pytest.param(lambda p, kind=kind, k={**own, **kwargs}: kind(p, **k), id=f"{name}, {desc}")
        yield pytest.param(lambda p, k=kwargs: Perturb(torch.optim.SGD(p, **k), **GATE), id=f"Perturb SGD, {desc}")
    for given in optim_inputs_func_adamw("cpu"):
        kwargs = given.kwargs
        yield pytest.param(
            lambda p, k=kwargs: Perturb(torch.optim.AdamW(p, **k), **GATE), id=f"Perturb AdamW, {given.desc}"
        )


inputs = pytest.mark.parametrize("make", table())


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def train(model, optimizer, steps):
    data = torch.linspace(-1, 1, 30).view(5, 6)
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = model(data).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def bits(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@inputs
def test_it_steps_prints_and_goes_on_from_its_state(make):
    whole, cut = network(), network()
    train(whole, make(whole.parameters()), 6)
    assert bits(whole).isfinite().all()
    optimizer = make(cut.parameters())
    train(cut, optimizer, 3)
    assert "Parameter Group 0" in repr(optimizer)
    again = copy.deepcopy(cut)
    resumed = make(again.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(again, resumed, 3)
    assert torch.equal(bits(whole), bits(again))


@inputs
def test_a_deep_copy_and_a_list_of_groups_go_on_alike(make):
    model = network()
    optimizer = make([{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}])
    train(model, optimizer, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3)
    train(twin_model, twin, 3)
    assert torch.equal(bits(model), bits(twin_model))


DESCENTS = [kwargs for _, kwargs in sgd_inputs() if "weight_decay" not in kwargs]


@pytest.mark.parametrize("kwargs", DESCENTS, ids=str)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_with_the_gate_shut_torchs_inputs_of_sgd_give_torchs_bits(kwargs, foreach):
    ours, torchs = network(), network()
    if foreach is True and isinstance(kwargs["lr"], torch.Tensor):
        pytest.skip("torch's foreach SGD takes no tensor as its rate")
    train(ours, ASGLD(ours.parameters(), foreach=foreach, **SHUT, **kwargs), 8)
    train(torchs, torch.optim.SGD(torchs.parameters(), foreach=foreach, **kwargs), 8)
    assert torch.equal(bits(ours), bits(torchs))


@pytest.mark.parametrize("given", optim_inputs_func_adamw("cpu"), ids=lambda given: given.desc)
def test_with_the_gate_shut_torchs_inputs_of_adamw_give_torchs_bits(given):
    ours, torchs = network(), network()
    train(ours, Perturb(torch.optim.AdamW(ours.parameters(), **given.kwargs), **SHUT), 8)
    train(torchs, torch.optim.AdamW(torchs.parameters(), **given.kwargs), 8)
    assert torch.equal(bits(ours), bits(torchs))


@pytest.mark.parametrize("make", LANGEVIN.values(), ids=LANGEVIN)
@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda: torch.zeros(3), TypeError, "should be an iterable of Tensors"),
        (list, ValueError, "empty parameter list"),
        (lambda: [{"params": [torch.zeros(2).requires_grad_() * 2]}], ValueError, "non-leaf"),
        (lambda: [{"params": [1.0]}], TypeError, "can only optimize Tensors"),
    ],
    ids=["a tensor", "nothing", "a result", "a number"],
)
def test_torchs_errors_of_parameters_are_torchs(make, params, error, message):
    with pytest.raises(error, match=message):
        make(params(), lr=0.1)


@pytest.mark.parametrize("make", LANGEVIN.values(), ids=LANGEVIN)
def test_a_parameter_in_two_groups_is_torchs_error(make):
    p = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [p]}, {"params": [p]}], lr=0.1)
