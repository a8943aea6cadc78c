"""Gates: what they measure, and how small a gradient they can see through mini-batch noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import ConfigError
from limbeck.optim import ASGLD
from limbeck.optim.gates import Vector, cross_product, head_square, observed_norm, observed_snr, vector_norm


@settings(deadline=None, max_examples=80)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=5),
    share=st.floats(0.2, 5.0),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_stopping_early_changes_no_decision(sizes, share, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
    limit = norm * share
    found = vector_norm([Vector(tensors, tensors)], limit, is_plain=True)
    assert (found <= limit) == (norm <= limit)
    assert found <= norm * (1 + 1e-3)
    if found <= limit:
        assert found == pytest.approx(norm, rel=1e-6)


def test_the_sum_stops_soon_when_the_gate_is_shut(monkeypatch):
    seen = []
    dot = torch.dot
    monkeypatch.setattr(torch, "dot", lambda a, b: seen.append(a.numel()) or dot(a, b))
    vector_norm([Vector([], [torch.ones(1_000_000), torch.ones(1_000_000)])], limit=1.0, is_plain=True)
    assert sum(seen) == 4096


def test_the_head_of_a_tensor_is_part_of_its_square():
    tensor = torch.full((300, 300), 0.5)
    assert head_square(tensor, ceiling=1.0) == pytest.approx(0.25 * 4096)
    assert head_square(tensor, ceiling=2000.0) == pytest.approx(0.25 * 16_384)
    assert head_square(tensor, ceiling=1e9) == pytest.approx(0.25 * 65_536)
    assert head_square(tensor[0, 0], ceiling=1.0) == 0.25
    for other in (tensor.T[:, :3], tensor.bfloat16(), tensor.clone().requires_grad_(), tensor.to("meta")):
        assert head_square(other, ceiling=1.0) == 0.0


def half_batches(params, optimizer, first, second):
    for p, gradient in zip(params, first, strict=True):
        p.grad = gradient / 2
    optimizer.observe_half()
    for p, gradient in zip(params, second, strict=True):
        p.grad += gradient / 2
    optimizer.observe_half()


def test_the_cross_product_is_that_of_the_two_halves():
    generator = torch.Generator().manual_seed(0)
    params = [torch.zeros(5, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    first, second = ([torch.randn(p.shape, generator=generator) for p in params] for _ in range(2))
    for p, a, b in zip(params, first, second, strict=True):
        p.grad = (a + b) / 2
    found = cross_product(params, [a / 2 for a in first])
    assert float(found) == pytest.approx(
        sum(float((a * b).sum()) for a, b in zip(first, second, strict=True)), rel=1e-6
    )


def test_the_cross_gate_sees_a_gradient_far_below_the_noise():
    """True norm 0.3, noise of each half 10: the raw norm never comes near, the cross gate does, and is unbiased."""
    numel, generator = 20_000, torch.Generator().manual_seed(1)
    p = torch.zeros(numel, requires_grad=True)
    optimizer = ASGLD([p], 1e-9, grad_threshold=0.5, noise_radius=1e-9, gate="cross", gate_beta=0.98)
    truth = torch.full((numel,), 0.3 / math.sqrt(numel))
    estimates, fires = [], []
    for _ in range(300):
        halves = [truth + 10 / math.sqrt(numel) * torch.randn(numel, generator=generator) for _ in range(2)]
        before = optimizer.param_groups[0]["gate_mean"]
        half_batches([p], optimizer, [halves[0]], [halves[1]])
        estimates.append((optimizer.param_groups[0]["gate_mean"] - 0.98 * before) / 0.02)
        assert float(p.grad.norm()) > 5
        optimizer.step()
        fires.append(int(optimizer.stats()["fires"]))
    spread = 100 / math.sqrt(numel) / math.sqrt(300)
    assert sum(estimates) / 300 == pytest.approx(0.09, abs=5 * spread)
    assert fires[-1] > 0


def test_the_scale_of_a_grad_scaler_is_taken_out():
    p = torch.zeros(3, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=1.0, gate="cross", gate_beta=0.0)
    for gradient in ([4.0, 0.0, 0.0], [8.0, 0.0, 0.0]):
        p.grad = torch.tensor(gradient) * 1024 / 2 + (0 if p.grad is None else p.grad)
        optimizer.observe_half(scale=1024.0)
    p.grad /= 1024.0
    optimizer.step()
    assert optimizer.param_groups[0]["gate_mean"] == pytest.approx(32.0)


def test_observed_norm_and_snr():
    assert float(observed_norm(0.5 * 4.0, 0.5)) == 2.0
    assert float(observed_norm(-1.0, 0.5)) == 0.0
    estimates = torch.tensor([3.0, 1.0, 2.0, 2.5], dtype=torch.float64)
    beta, weight, mean, square = 0.9, 0.0, 0.0, 0.0
    for value in estimates.tolist():
        weight, mean, square = (beta * w + 0.1 * v for w, v in ((weight, 1), (mean, value), (square, value**2)))
    weights = 0.1 * 0.9 ** torch.arange(3, -1, -1, dtype=torch.float64)
    average = float((weights * estimates).sum() / weights.sum())
    variance = float((weights * (estimates - average) ** 2).sum() / weights.sum())
    expected = average / (2 * math.sqrt(variance * 0.1 / 1.9))
    assert float(observed_snr(mean, square, weight, beta)) == pytest.approx(expected)
    assert float(observed_snr(0.1, 0.1, 0.1, beta)) == math.inf
    assert float(observed_snr(0.0, 0.0, 0.1, beta)) == 0.0


def test_the_snr_gate_needs_no_threshold():
    numel, generator = 2000, torch.Generator().manual_seed(2)
    p = torch.zeros(numel, requires_grad=True)
    fires = {}
    for size in (0.0, 3.0):
        optimizer = ASGLD([p], 1e-9, noise_radius=1e-9, gate="snr", gate_beta=0.95, escape_steps=20)
        truth = torch.full((numel,), size / math.sqrt(numel))
        for _ in range(200):
            halves = [truth + torch.randn(numel, generator=generator) / math.sqrt(numel) for _ in range(2)]
            half_batches([p], optimizer, [halves[0]], [halves[1]])
            optimizer.step()
        fires[size] = int(optimizer.stats()["fires"])
    assert fires[0.0] >= 5
    assert fires[3.0] == 0


def test_a_gate_without_its_estimate_says_what_to_call():
    p = torch.zeros(3, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=1.0, gate="cross")
    p.grad = torch.zeros(3)
    with pytest.raises(ConfigError, match="observe_half"):
        optimizer.step()
