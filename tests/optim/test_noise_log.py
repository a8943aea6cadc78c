"""What a training log says of the gate and the noise."""

import json

import pytest
import torch

from limbeck.optim import ASG, ASGLD, SGLD, Perturb
from limbeck.optim.log import noise_columns, noise_notes


def stepped(optimizer, p, gradient, steps=1):
    for _ in range(steps):
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
    return optimizer


def param():
    return torch.ones(9, requires_grad=True)


def test_an_optimizer_without_noise_has_no_columns_and_nothing_to_say():
    p = param()
    optimizer = stepped(torch.optim.AdamW([p]), p, 1.0)
    assert noise_columns(optimizer) == {}
    assert noise_notes(optimizer) == []


def test_a_shut_gate_shows_its_statistic_and_says_that_it_stayed_shut():
    p = param()
    optimizer = stepped(ASGLD([p], 0.1, grad_threshold=1e-3), p, 2.0, steps=3)
    assert noise_columns(optimizer) == {
        "gate_statistic": pytest.approx(6.0),
        "gate_threshold": pytest.approx(1e-3),
        "fires": 0,
        "noise_norm": 0.0,
    }
    (note,) = noise_notes(optimizer)
    assert "ASGLD never opened (grad_threshold 0.001)" in note


def test_auto_says_what_it_takes_a_share_of():
    p = param()
    optimizer = stepped(Perturb(torch.optim.SGD([p], 0.1), grad_threshold="auto"), p, 2.0, steps=3)
    assert noise_columns(optimizer)["gate_threshold"] == pytest.approx(0.3)
    (note,) = noise_notes(optimizer)
    assert "auto, a twentieth of 6" in note


def test_an_open_gate_has_nothing_to_say():
    p = param()
    optimizer = stepped(ASG([p], 0.1, grad_threshold=10.0), p, 1.0)
    assert noise_notes(optimizer) == []
    assert noise_columns(optimizer)["fires"] == 1


def test_noise_at_every_step_needs_no_gate_to_open():
    p = param()
    for optimizer in (SGLD([p], 0.1, temperature=1.0), ASGLD([p], 0.1, mode="constant", noise_radius=1.0)):
        columns = noise_columns(stepped(optimizer, p, 1.0))
        assert columns["gate_statistic"] is columns["gate_threshold"] is None
        assert columns["noise_norm"] > 0
        assert noise_notes(optimizer) == []
        assert json.loads(json.dumps(columns, allow_nan=False)) == columns
