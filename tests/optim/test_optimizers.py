"""The contract of torch.optim.Optimizer, kept by every member of the family: one table, the same checks."""

import copy
import io

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from limbeck.errors import ConfigError
from limbeck.optim import AGLD, ASG, ASGLD, PSGLD, SGLD, NoisySGD, Perturb, PerturbedGD, PerturbedSGD

GATED = {"grad_threshold": 10.0, "escape_steps": 2}
UNSEEDED = {
    "ASGLD": lambda p, **k: ASGLD(p, 0.05, **GATED, **k),
    "ASGLD momentum": lambda p, **k: ASGLD(p, 0.05, momentum=0.9, **GATED, **k),
    "ASGLD ema": lambda p, **k: ASGLD(p, 0.05, gate="ema", **GATED, **k),
    "ASGLD auto smooth": lambda p, **k: ASGLD(p, 0.05, grad_threshold="auto", mode="smooth", noise_radius=0.1, **k),
    "ASGLD ball relative": lambda p, **k: ASGLD(p, 0.05, noise="ball", noise_scale="relative", **GATED, **k),
    "ASGLD annealed": lambda p, **k: ASGLD(p, 0.05, mode="annealed", noise_radius=0.1, **k),
    "ASG": lambda p, **k: ASG(p, 0.05, **GATED, **k),
    "AGLD": lambda p, **k: AGLD(p, 0.05, weight_decay=0.1, **GATED, **k),
    "SGLD": lambda p, **k: SGLD(p, 0.05, temperature=0.1, **k),
    "PSGLD": lambda p, **k: PSGLD(p, 0.05, temperature=0.1, correction=False, **k),
    "PerturbedGD": lambda p, **k: PerturbedGD(p, 0.05, noise_radius=0.1, loss_drop=1e-9, **GATED, **k),
    "PerturbedSGD": lambda p, **k: PerturbedSGD(p, 0.05, noise_radius=0.1, **k),
    "NoisySGD": lambda p, **k: NoisySGD(p, 0.05, **k),
    "Perturb AdamW": lambda p, **k: Perturb(torch.optim.AdamW(p, 0.05), **GATED, **k),
    "Perturb SGD ema": lambda p, **k: Perturb(torch.optim.SGD(p, 0.05, momentum=0.9), gate="ema", **GATED, **k),
}
FAMILY = {name: (lambda p, make=make, **k: make(p, **{"seed": 3, **k})) for name, make in UNSEEDED.items()}
"""With a seed, so that two that are made alike add the same noise."""
FAMILY["ASG"] = UNSEEDED["ASG"]
MAXIMIZES = [name for name in FAMILY if name != "PSGLD" and "Perturb " not in name]

family = pytest.mark.parametrize("name", FAMILY)


def make_params():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in [(6, 5), (9,), ()]]


def objective(params):
    return sum(((p - 1) ** 2).sum() * 0.4 + p.sum().cos() for p in params)


def closure_for(optimizer, params):
    def closure():
        optimizer.zero_grad()
        loss = objective(params)
        loss.backward()
        return loss

    return closure


def train(optimizer, params, steps):
    for _ in range(steps):
        optimizer.step(closure_for(optimizer, params))


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def through_a_file(state):
    """Save and load with weights_only, which refuses every pickled object that is not plain data."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@family
def test_the_loss_falls(name):
    params = make_params()
    before = objective(params).item()
    train(FAMILY[name](params), params, 40)
    assert objective(params).item() < before


@family
def test_a_closure_is_optional_and_its_loss_comes_back(name):
    with_closure, without = make_params(), make_params()
    first, second = FAMILY[name](with_closure), FAMILY[name](without)
    for _ in range(6):
        expected = objective(with_closure).item()
        assert first.step(closure_for(first, with_closure)).item() == expected
        closure_for(second, without)()
        assert second.step() is None
    assert_same_bits(with_closure, without)


@family
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(name):
    whole, cut = make_params(), make_params()
    train(FAMILY[name](whole), whole, 17)
    optimizer = FAMILY[name](cut)
    train(optimizer, cut, 8)
    state = through_a_file(optimizer.state_dict())
    resumed = [p.detach().clone().requires_grad_() for p in cut]
    optimizer = FAMILY[name](resumed)
    optimizer.load_state_dict(state)
    train(optimizer, resumed, 9)
    assert_same_bits(resumed, whole)


@family
def test_saving_twice_gives_the_same_state(name):
    params = make_params()
    optimizer = FAMILY[name](params)
    train(optimizer, params, 5)
    state = through_a_file(optimizer.state_dict())
    other = FAMILY[name](make_params())
    other.load_state_dict(state)
    again = other.state_dict()
    assert again["param_groups"] == state["param_groups"]
    for index, values in state["state"].items():
        for key, value in values.items():
            found = again["state"][index][key]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


@family
def test_a_deep_copy_goes_on_alike_and_apart(name):
    params = make_params()
    optimizer = FAMILY[name](params)
    train(optimizer, params, 5)
    twins, twin = copy.deepcopy((params, optimizer))
    train(optimizer, params, 6)
    assert any(not torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    train(twin, twins, 6)
    assert_same_bits(twins, params)


@family
def test_with_a_seed_the_global_generator_neither_matters_nor_moves(name):
    first, second = make_params(), make_params()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train(FAMILY[name](first), first, 6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    train(FAMILY[name](second), second, 6)
    assert_same_bits(first, second)


@pytest.mark.parametrize("name", [name for name in FAMILY if name not in ("ASG", "ASGLD auto smooth")])
def test_the_seed_matters(name):
    first, second = make_params(), make_params()
    train(FAMILY[name](first, seed=1), first, 20)
    train(FAMILY[name](second, seed=2), second, 20)
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", [n for n in MAXIMIZES if n != "PerturbedGD"])
def test_maximize_climbs_by_the_steps_that_descend_the_negative(name):
    up, down = make_params(), make_params()
    climbing, descending = FAMILY[name](up, maximize=True), FAMILY[name](down)
    for _ in range(6):
        for params, optimizer, sign in ((up, climbing, -1), (down, descending, 1)):
            optimizer.zero_grad()
            (sign * objective(params)).backward()
            optimizer.step()
    assert_same_bits(up, down)


@family
def test_a_scheduler_moves_the_learning_rate(name):
    params = make_params()
    optimizer = FAMILY[name](params)
    scheduler: LRScheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    train(optimizer, params, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["noise_radius"] = 0.0
    train(optimizer, params, 1)
    assert_same_bits(params, before)


@family
def test_a_group_added_later_joins_in(name):
    params, late = make_params(), torch.ones(4, requires_grad=True)
    optimizer = FAMILY[name](params)
    train(optimizer, params, 3)
    optimizer.add_param_group({"params": [late], "lr": 0.01})
    assert optimizer.param_groups[1]["noise_step"] == 3
    train(optimizer, [*params, late], 3)
    assert not torch.equal(late.detach(), torch.ones(4))
    assert optimizer.param_groups[1]["noise_step"] == 6


@family
def test_a_parameter_without_gradient_stays_and_hooks_run(name):
    params, unused = make_params(), torch.ones(3, requires_grad=True)
    optimizer = FAMILY[name]([*params, unused])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, params, 2)
    assert torch.equal(unused.detach(), torch.ones(3))
    assert calls == ["before", "after"] * 2


@family
def test_a_step_without_any_gradient_does_nothing(name):
    params = make_params()
    FAMILY[name](params).step()
    assert_same_bits(params, make_params())


@family
def test_gradients_are_left_as_they_are(name):
    params = make_params()
    optimizer = FAMILY[name](params)
    closure_for(optimizer, params)()
    before = [p.grad.clone() for p in params]
    optimizer.step()
    for p, gradient in zip(params, before, strict=True):
        assert torch.equal(p.grad, gradient)


@family
def test_named_parameters_give_noise_that_their_order_does_not_change(name):
    def run(order):
        params = dict(zip("abc", make_params(), strict=True))
        optimizer = FAMILY[name]([(key, params[key]) for key in order])
        for _ in range(4):
            for key in params:
                params[key].grad = params[key].detach() * 0.1
            optimizer.step()
        return [params[key] for key in "abc"]

    # The sphere and the ball are normalised by a sum over parameters, whose order float32 rounding mostly hides.
    for a, b in zip(run("abc"), run("cab"), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


@family
def test_a_grad_scaler_leaves_no_trace_and_a_skipped_step_none_at_all(name):
    plain, scaled = make_params(), make_params()
    first, second = FAMILY[name](plain), FAMILY[name](scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(8):
        if step == 4:
            second.zero_grad()
            (scaler.scale(objective(scaled)) * float("inf")).backward()
            scaler.step(second)
            scaler.update(1024.0)
        for params, optimizer in ((plain, first), (scaled, second)):
            optimizer.zero_grad()
            loss = objective(params)
            (scaler.scale(loss) if optimizer is second else loss).backward()
        first.step()
        scaler.step(second)
        scaler.update()
    assert first.param_groups[0]["noise_step"] == second.param_groups[0]["noise_step"] == 8
    assert_same_bits(plain, scaled)


@family
def test_accumulated_gradients_get_one_draw(name):
    whole, parts = make_params(), make_params()
    first, second = FAMILY[name](whole), FAMILY[name](parts)
    for _ in range(6):
        closure_for(first, whole)()
        second.zero_grad()
        for _ in range(2):
            (objective(parts) / 2).backward()
        first.step()
        second.step()
    assert_same_bits(whole, parts)


def test_clipping_happens_before_the_gate_and_not_to_the_noise():
    p = torch.zeros(4000, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=1.0, noise_radius=5.0)
    p.grad = torch.ones(4000)
    torch.nn.utils.clip_grad_norm_([p], 0.5)
    optimizer.step()
    assert optimizer.stats()["fires"] == 1
    assert float(p.detach().norm()) == pytest.approx(5.0, rel=0.06)


@family
def test_sparse_gradients_are_refused(name):
    if name == "Perturb AdamW":
        pytest.skip("AdamW itself refuses them")
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = FAMILY[name](embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("name", [n for n in FAMILY if n not in ("PSGLD", "Perturb AdamW", "Perturb SGD ema")])
def test_complex_parameters_are_pairs_of_real_ones(name):
    start = torch.view_as_complex(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    z, pair = start.clone().requires_grad_(), torch.view_as_real(start).clone().requires_grad_()
    first, second = FAMILY[name]([z]), FAMILY[name]([pair])
    for _ in range(8):
        z.grad = z.detach() * 0.5
        pair.grad = pair.detach() * 0.5
        first.step()
        second.step()
    assert_same_bits([torch.view_as_real(z.detach())], [pair.detach()])


@family
def test_channels_last_and_double_parameters_work(name):
    p = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    q = p.detach().contiguous().clone().requires_grad_()
    first, second = FAMILY[name]([p]), FAMILY[name]([q])
    for _ in range(4):
        p.grad, q.grad = p.detach() * 0.1, q.detach() * 0.1
        first.step()
        second.step()
    assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)


def test_perturb_resumes_from_a_checkpoint_of_the_bare_optimizer():
    params = make_params()
    bare = torch.optim.AdamW(params, 0.05)
    train(bare, params, 3)
    wrapped = Perturb(torch.optim.AdamW(params, 0.05), **GATED)
    wrapped.load_state_dict(bare.state_dict())
    train(wrapped, params, 3)
    assert wrapped.param_groups[0]["noise_step"] == 3
    assert int(wrapped.state[params[0]]["step"]) == 6


def test_perturb_refuses_masters():
    with pytest.raises(ConfigError, match="master"):
        Perturb(torch.optim.SGD(make_params(), 0.1), grad_threshold=1.0, low_precision="master")


def test_perturb_works_over_muon():
    p = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q = p.detach().clone().requires_grad_()
    bare, wrapped = torch.optim.Muon([q], 0.01), Perturb(torch.optim.Muon([p], 0.01), **GATED, noise_radius=0.3)
    p.grad, q.grad = p.detach() * 0.01, p.detach() * 0.01
    bare.step()
    wrapped.step()
    assert float((p.detach() - q.detach()).norm()) == pytest.approx(float(wrapped.stats()["noise_norm"]), rel=1e-4)


def test_capturable_is_not_offered():
    """A captured graph would replay one step's noise for ever."""
    with pytest.raises(TypeError, match="capturable"):
        ASGLD(make_params(), 0.1, grad_threshold=1.0, capturable=True)
