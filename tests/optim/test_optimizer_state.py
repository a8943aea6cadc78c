"""State survives what torch offers: foreign checkpoints, checkpoints at any moment, replaced and frozen parameters."""

import copy
import warnings
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from limbeck.errors import ConfigError
from limbeck.optim import (
    AGLD,
    ASG,
    ASGLD,
    PSGLD,
    SAM,
    SGHMC,
    SGLD,
    SGNHT,
    NoisySGD,
    Perturb,
    PerturbedGD,
    PerturbedSGD,
)
from limbeck.optim.settings import COUNTERS

OPEN = {"grad_threshold": 10.0, "escape_steps": 1, "noise_radius": 0.1}
FAMILY = {
    "ASGLD": lambda p: ASGLD(p, 0.05, seed=3, **OPEN),
    "ASGLD momentum": lambda p: ASGLD(p, 0.05, seed=3, momentum=0.9, dampening=0.5, **OPEN),
    "ASGLD ema": lambda p: ASGLD(p, 0.05, seed=3, gate="ema", **OPEN),
    "ASGLD ema momentum": lambda p: ASGLD(p, 0.05, seed=3, gate="ema", momentum=0.9, reset_momentum=True, **OPEN),
    "ASGLD auto": lambda p: ASGLD(p, 0.05, seed=3, grad_threshold="auto", noise_radius=0.1),
    "ASG": lambda p: ASG(p, 0.05, grad_threshold=10.0, escape_steps=1),
    "AGLD": lambda p: AGLD(p, 0.05, seed=3, weight_decay=0.1, **OPEN),
    "SGLD": lambda p: SGLD(p, 0.05, temperature=0.1, seed=3),
    "SGHMC": lambda p: SGHMC(p, 0.05, temperature=0.1, seed=3),
    "SGNHT": lambda p: SGNHT(p, 0.05, temperature=0.1, seed=3),
    "PSGLD": lambda p: PSGLD(p, 0.05, temperature=0.1, seed=3),
    "PerturbedGD": lambda p: PerturbedGD(p, 0.05, loss_drop=1e-9, seed=3, **OPEN),
    "PerturbedSGD": lambda p: PerturbedSGD(p, 0.05, noise_radius=0.1, seed=3),
    "NoisySGD": lambda p: NoisySGD(p, 0.05, seed=3),
    "Perturb SGD": lambda p: Perturb(torch.optim.SGD(p, 0.05), seed=3, **OPEN),
    "Perturb SGD ema": lambda p: Perturb(torch.optim.SGD(p, 0.05, momentum=0.9), gate="ema", seed=3, **OPEN),
}
family = pytest.mark.parametrize("name", FAMILY)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def train(model, optimizer, steps, after=lambda step: None):
    inputs = torch.linspace(-1, 1, 48).view(8, 6)
    for step in steps:
        (model(inputs) - 0.3).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@family
@pytest.mark.parametrize("moment", [-1, 0, 3])
def test_a_distributed_checkpoint_at_any_moment_changes_nothing(name, moment):
    plain, saved = network(), network()
    first, second = FAMILY[name](plain.named_parameters()), FAMILY[name](saved.named_parameters())
    train(plain, first, range(6))

    def save(step):
        if step == moment:
            for _ in range(2):
                get_optimizer_state_dict(saved, second)

    save(-1)
    train(saved, second, range(6), save)
    assert torch.equal(weights(plain), weights(saved))
    assert second.param_groups[0]["noise_step"] == 6
    assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"] == 0.05


@family
@pytest.mark.parametrize("is_flat", [False, True])
def test_a_distributed_checkpoint_goes_on_in_a_fresh_optimizer(name, is_flat):
    options = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    whole = network()
    train(whole, FAMILY[name](whole.named_parameters()), range(7))
    cut = network()
    optimizer = FAMILY[name](cut.named_parameters())
    train(cut, optimizer, range(4))
    state = get_optimizer_state_dict(cut, optimizer, options=options)
    again = network()
    again.load_state_dict(cut.state_dict())
    fresh = FAMILY[name](again.named_parameters())
    set_optimizer_state_dict(again, fresh, copy.deepcopy(state), options=options)
    train(again, fresh, range(4, 7))
    assert torch.equal(weights(whole), weights(again))


@pytest.mark.parametrize("name", ["ASGLD", "ASGLD ema", "ASG", "SGLD", "PSGLD", "Perturb SGD"])
def test_a_warm_up_from_zero_takes_its_first_step_when_there_is_one(name):
    """The learning rate of a schedule that starts at 0 is no checkpoint, and its steps move nothing either."""
    model = network()
    optimizer = FAMILY[name](model.named_parameters())
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(model).clone()
    train(model, optimizer, range(2))
    assert torch.equal(weights(model), before)
    assert optimizer.param_groups[0]["noise_step"] == 0
    optimizer.param_groups[0]["lr"] = 0.05
    train(model, optimizer, range(1))
    assert optimizer.param_groups[0]["noise_step"] == 1
    assert not torch.equal(weights(model), before)


def test_a_rate_of_zero_moves_the_buffers_as_torchs_sgd_does():
    ours, torchs = network(), network()
    first = ASG(ours.parameters(), 0.0, grad_threshold=1e9, step_boost=1, momentum=0.9, dampening=0.2)
    second = torch.optim.SGD(torchs.parameters(), 0.0, momentum=0.9, dampening=0.2)
    for model, optimizer in ((ours, first), (torchs, second)):
        train(model, optimizer, range(2))
        optimizer.param_groups[0]["lr"] = 0.1
        train(model, optimizer, range(3))
    assert torch.equal(weights(ours), weights(torchs))


def stepped(optimizer, p):
    p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "foreign",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.AdamW(p, 0.1),
        lambda p: torch.optim.RMSprop(p, 0.1),
    ],
    ids=["sgd momentum", "sgd", "adamw", "rmsprop"],
)
@pytest.mark.parametrize("name", [name for name in FAMILY if "Perturb " not in name])
def test_a_run_that_another_optimizer_began_goes_on(name, foreign):
    p = torch.ones(5, requires_grad=True)
    state = stepped(foreign([p]), p).state_dict()
    optimizer = FAMILY[name]([p])
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key not in state["param_groups"][0]}
    optimizer.load_state_dict(state)
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.1
    assert {key: group[key] for key in settings if key != "params"} == {
        key: value for key, value in settings.items() if key != "params"
    }
    stepped(optimizer, p)
    assert group["noise_step"] == 1
    assert torch.isfinite(p).all()


def test_momentum_goes_on_from_torchs_buffer():
    p, q = torch.ones(5, requires_grad=True), torch.ones(5, requires_grad=True)
    sgd, other = (torch.optim.SGD([x], 0.1, momentum=0.9) for x in (p, q))
    ours = ASG([q], 0.1, grad_threshold=1e9, step_boost=1, momentum=0.9)
    stepped(sgd, p)
    stepped(other, q)
    ours.load_state_dict(other.state_dict())
    stepped(sgd, p)
    stepped(ours, q)
    assert torch.equal(p, q)


def test_settings_that_one_group_has_stay_its_own_when_a_bare_state_is_loaded():
    def groups():
        return [
            {"params": [torch.ones(6, requires_grad=True)], "escape_steps": 9},
            {"params": [torch.ones(4, requires_grad=True)], "noise_radius": 0.0, "seed": 5},
        ]

    settings = {"mode": "constant", "noise_radius": 0.3, "seed": 1}
    for make in (
        lambda: Perturb(torch.optim.SGD(groups(), 0.1), **settings),
        lambda: ASGLD(groups(), 0.1, **settings),
    ):
        optimizer = make()
        bare = torch.optim.SGD([{"params": [torch.ones(6)]}, {"params": [torch.ones(4)]}], lr=0.7)
        before = [dict(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(bare.state_dict())
        for group, old in zip(optimizer.param_groups, before, strict=True):
            assert group["lr"] == 0.7
            assert [group[key] for key in ("noise_radius", "escape_steps", "seed")] == [
                old[key] for key in ("noise_radius", "escape_steps", "seed")
            ]


def test_counters_that_a_state_lacks_start_anew():
    p = torch.zeros(5, requires_grad=True)
    optimizer = ASGLD([p], 0.1, **OPEN)
    for _ in range(3):
        stepped(optimizer, p)
    optimizer.load_state_dict(torch.optim.SGD([p], 0.1).state_dict())
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in COUNTERS if key in group} == {
        key: value for key, value in COUNTERS.items() if key in group
    }


def test_a_state_of_an_older_version_lacks_what_came_later():
    p = torch.zeros(5, requires_grad=True)
    optimizer = ASGLD([p], 0.1, gate="ema", momentum=0.9, seed=3, **OPEN)
    for _ in range(3):
        stepped(optimizer, p)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["gate_median_weight"], group["noise_scale"], group["boost_steps"]
    del state["state"][0]["momentum_weight"]
    fresh = ASGLD([p], 0.1, gate="ema", momentum=0.9, **OPEN)
    fresh.load_state_dict(state)
    stepped(fresh, p)
    assert fresh.param_groups[0]["noise_step"] == 4
    # The buffer is taken for one that has run for long.
    assert fresh.state[p]["momentum_weight"] == pytest.approx(10.0)


def test_a_state_that_cannot_work_is_refused_and_changes_nothing():
    p = torch.zeros(5, requires_grad=True)
    for optimizer in (ASGLD([p], 0.1, **OPEN), Perturb(torch.optim.SGD([p], 0.1), **OPEN)):
        stepped(optimizer, p)
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["noise"] = "cube"
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ConfigError, match="noise is 'cube'"):
            optimizer.load_state_dict(state)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("sizes", [(50, 5_000), (5_000, 50)])
@pytest.mark.parametrize("how", ["replaced", "resized"])
@pytest.mark.parametrize("kind", ["ASGLD", "Perturb"])
def test_the_energy_is_that_of_the_parameters_that_there_are(sizes, how, kind):
    settings = {"mode": "constant", "noise_radius": 1.0}
    p = nn.Parameter(torch.zeros(sizes[0]))
    optimizer = ASGLD([p], 0.1, **settings) if kind == "ASGLD" else Perturb(torch.optim.SGD([p], 0.1), **settings)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    if how == "replaced":
        p = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(sizes[1]))
    else:
        p.grad = None
        p.data = torch.zeros(sizes[1])
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert float(p.detach().norm()) == pytest.approx(1.0, abs=5 / (2 * min(sizes)) ** 0.5)


def test_a_parameter_that_became_complex_is_seen_as_pairs():
    p = nn.Parameter(torch.zeros(300))
    optimizer = ASGLD([p], 0.1, mode="constant", noise_radius=1.0)
    stepped(optimizer, p)
    z = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(300, dtype=torch.complex64))
    z.grad = torch.zeros_like(z)
    optimizer.step()
    assert float(torch.view_as_real(z.detach()).norm()) == pytest.approx(1.0, rel=0.2)


@family
def test_a_frozen_parameter_stays_whatever_gradient_it_still_has(name):
    kept, frozen = torch.ones(40, requires_grad=True), torch.ones(30, requires_grad=True)
    optimizer = FAMILY[name]([kept, frozen])
    for p in (kept, frozen):
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    for _ in range(3):
        kept.grad = torch.full_like(kept, 0.1)
        optimizer.step()
    if name == "Perturb SGD ema":  # its SGD moves what has a momentum buffer, as torch's does
        return
    assert torch.equal(frozen, before)


def test_the_noise_of_what_trains_keeps_its_energy_when_the_rest_is_frozen():
    kept, frozen = torch.zeros(3000, requires_grad=True), torch.zeros(9000, requires_grad=True)
    optimizer = ASGLD([kept, frozen], 0.1, mode="constant", noise_radius=1.0)
    frozen.requires_grad_(False)
    kept.grad, frozen.grad = torch.zeros_like(kept), torch.zeros_like(frozen)
    optimizer.step()
    assert float(kept.detach().norm()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}, {"maximize": True}], ids=str
)
def test_a_group_of_mixed_types_is_stepped_as_torchs_sgd_steps_it(dtypes, foreach, settings):
    def params():
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(70, generator=generator).to(dtype).requires_grad_() for dtype in dtypes]

    ours, torchs = params(), params()
    first = ASG(ours, 0.05, grad_threshold=1e9, step_boost=1, foreach=foreach, **settings)
    second = torch.optim.SGD(torchs, 0.05, foreach=foreach, **settings)
    for _ in range(8):
        for tensors, optimizer in ((ours, first), (torchs, second)):
            optimizer.zero_grad()
            sum((p.float() ** 2).sum() * 0.3 for p in tensors).backward()
            optimizer.step()
    for a, b in zip(ours, torchs, strict=True):
        assert torch.equal(a, b)


@family
def test_parameters_without_elements_are_a_step_that_does_nothing(name):
    empty = torch.zeros(0, 3, requires_grad=True)
    optimizer = FAMILY[name]([empty])
    for _ in range(3):
        empty.grad = torch.zeros(0, 3)
        optimizer.step()
    assert optimizer.param_groups[0]["noise_step"] == 3


@pytest.mark.parametrize("noise", ["gaussian", "sphere", "ball"])
@pytest.mark.parametrize("scale", ["energy", "relative"])
def test_an_empty_part_beside_others_changes_nothing(noise, scale):
    settings = {"mode": "constant", "noise_radius": 0.5, "noise": noise, "noise_scale": scale, "seed": 2}
    p, q, empty = torch.ones(20, requires_grad=True), torch.ones(20, requires_grad=True), torch.zeros(0)
    empty.requires_grad_()
    alone, beside = ASGLD([("p", p)], 0.1, **settings), ASGLD([("e", empty), ("p", q)], 0.1, **settings)
    for tensor in (p, q, empty):
        tensor.grad = torch.zeros_like(tensor)
    alone.step()
    beside.step()
    # The ball takes its radius from the first parameter of all.
    assert torch.equal(p, q) or noise == "ball"
    assert torch.isfinite(beside.stats()["noise_norm"])


@pytest.mark.parametrize("name", [name for name in FAMILY if "Perturb " not in name])
def test_a_group_that_is_refused_leaves_nothing(name):
    p, q = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizer = FAMILY[name]([p])
    wrong = {"temperature": -1.0} if name in ("SGLD", "PSGLD") else {"noise": "cube"}
    with pytest.raises(ConfigError):
        optimizer.add_param_group({"params": [q], **wrong})
    assert [group["params"] for group in optimizer.param_groups] == [[p]]
    stepped(optimizer, p)
    optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 2


def test_perturb_that_is_refused_leaves_its_optimizer_as_it_was():
    p = torch.ones(4, requires_grad=True)
    inner = torch.optim.SGD([p], 0.1)
    keys = set(inner.param_groups[0])
    with pytest.raises(ConfigError):
        Perturb(inner, mode="constant")
    assert set(inner.param_groups[0]) == keys
    optimizer = Perturb(inner, **OPEN)
    with pytest.raises(ConfigError):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], "gate": "snr"})
    assert len(inner.param_groups) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda p: ASGLD(p, 0.1, mode="constant", noise_radius=1.0),
        lambda p: SGLD(p, 0.1, temperature=1.0),
        lambda p: Perturb(torch.optim.SGD(p, 0.1), mode="constant", noise_radius=1.0),
    ],
    ids=["ASGLD", "SGLD", "Perturb"],
)
def test_perturb_refuses_an_optimizer_with_noise_of_its_own(make):
    with pytest.raises(ConfigError, match="adds noise of its own"):
        Perturb(make([torch.zeros(3, requires_grad=True)]), mode="constant", noise_radius=1.0)


def test_the_hooks_of_perturb_run_once_each_and_may_change_the_state():
    p = torch.ones(3, requires_grad=True)
    optimizer, calls = Perturb(torch.optim.SGD([p], 0.1, momentum=0.9), **OPEN), []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda opt, state: calls.append("after saving") or {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: calls.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append(opt.param_groups[0]["noise_radius"]))
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append("before the step"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("after the step"))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict({key: value for key, value in state.items() if key != "extra"})
    stepped(optimizer, p)
    assert calls == ["before saving", "after saving", "before loading", 0.1, "before the step", "after the step"]


def test_the_hooks_of_the_inner_optimizer_run_as_well():
    p = torch.ones(3, requires_grad=True)
    inner, calls = torch.optim.SGD([p], 0.1), []
    inner.register_state_dict_post_hook(lambda opt, state: calls.append("saved"))
    optimizer = Perturb(inner, **OPEN)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saved"]


def test_what_is_set_on_perturb_is_set_on_its_optimizer():
    p = torch.ones(3, requires_grad=True)
    optimizer = Perturb(torch.optim.AdamW([p], 0.1), **OPEN)
    stepped(optimizer, p)
    assert optimizer.optimizer.state
    optimizer.state = defaultdict(dict)
    assert not optimizer.optimizer.state
    stepped(optimizer, p)
    assert int(optimizer.optimizer.state[p]["step"]) == 1
    optimizer.param_groups = optimizer.param_groups[:1]
    optimizer.defaults = {**optimizer.defaults, "lr": 3.0}
    assert optimizer.optimizer.defaults["lr"] == 3.0


@pytest.mark.parametrize("make", [SGLD, PSGLD], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: CyclicLR(optimizer, 0.01, 0.1),
        lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=10),
    ],
    ids=["cyclic", "one cycle"],
)
def test_schedules_of_momentum_are_refused_by_samplers_which_have_none(make, schedule):
    optimizer = make([torch.zeros(3, requires_grad=True)], 0.1, temperature=1.0)
    with pytest.raises(ValueError, match="momentum"):
        schedule(optimizer)
    assert "momentum" not in optimizer.param_groups[0]


def test_a_schedule_of_momentum_moves_that_of_the_descent_and_the_average_of_the_gate():
    p = torch.zeros(4, requires_grad=True)
    optimizer = ASGLD([p], 1e-9, grad_threshold=1e9, noise_radius=1e-9, gate="ema", momentum=0.9)
    gradients = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    buffer, weight = torch.zeros(4), 0.0
    for step, gradient in enumerate(gradients):
        momentum = optimizer.param_groups[0]["momentum"] = 0.9 if step % 3 else 0.5
        p.grad = gradient.clone()
        optimizer.step()
        buffer, weight = momentum * buffer + gradient, momentum * weight + 1
        assert float(optimizer.stats()["statistic"]) == pytest.approx(float((buffer / weight).norm()), rel=1e-5)


@pytest.mark.parametrize("gate", ["cross", "snr"])
def test_a_skipped_step_leaves_no_trace_in_the_averages_of_half_batches(gate):
    def run(overflows):
        p = torch.ones(60, requires_grad=True)
        settings = {"gate": gate, "noise_radius": 1e-3, "escape_steps": 2, "seed": 1}
        optimizer = ASGLD([p], 0.01, **settings, **({"grad_threshold": 1.0} if gate == "cross" else {}))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
        counts = []
        for step in range(20):
            for is_bad in [True] * (step in overflows) + [False]:
                optimizer.zero_grad()
                for half in range(2):
                    loss = (p * 1e-3).sum() * (1 + half) / 2 * (float("inf") if is_bad and half else 1)
                    scaler.scale(loss).backward()
                    optimizer.observe_half(scale=256.0)
                scaler.step(optimizer)
                scaler.update(256.0)
            group = optimizer.param_groups[0]
            counts.append((group["fires"], group["gate_mean"], group["gate_square"], group["gate_weight"]))
        return counts

    assert run({1, 7}) == run(set())


def test_a_half_batch_that_was_given_up_is_forgotten_with_its_gradients():
    p = torch.zeros(3, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=1.0, gate="cross", gate_beta=0.0)
    p.grad = torch.full((3,), 50.0)
    optimizer.observe_half()
    optimizer.zero_grad()
    for gradient in (1.0, 2.0):
        p.grad = torch.full((3,), gradient / 2) + (0 if p.grad is None else p.grad)
        optimizer.observe_half()
    optimizer.step()
    assert optimizer.param_groups[0]["gate_mean"] == pytest.approx(3 * 2.0)


def test_a_step_after_one_half_batch_says_so():
    p = torch.zeros(3, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=1.0, gate="cross")
    p.grad = torch.ones(3)
    optimizer.observe_half()
    with pytest.raises(ConfigError, match="after one half-batch only"):
        optimizer.step()


def test_half_batches_that_reach_different_parameters_say_so_and_leave_nothing_behind():
    p, q = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = ASGLD([p, q], 0.1, grad_threshold=1.0, gate="cross")
    p.grad = torch.ones(3)
    optimizer.observe_half()
    p.grad, q.grad = None, torch.ones(3)
    with pytest.raises(ConfigError, match="different parameters"):
        optimizer.observe_half()
    optimizer.observe(1.0)
    optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gate", ["cross", "snr"])
def test_an_estimate_that_is_not_finite_leaves_the_averages(value, gate):
    p = torch.zeros(3, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=1.0, gate=gate, noise_radius=0.1, escape_steps=0)
    for square in (0.25, value, 0.25):
        p.grad = torch.zeros(3)
        optimizer.observe(square)
        optimizer.step()
    group = optimizer.param_groups[0]
    assert group["gate_mean"] / group["gate_weight"] == pytest.approx(0.25)


def test_a_deep_copy_keeps_what_was_observed():
    p = torch.zeros(3, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=1.0, gate="cross")
    p.grad = torch.ones(3)
    optimizer.observe(0.5)
    _, twin = copy.deepcopy((p, optimizer))
    twin.step()
    assert twin.param_groups[0]["gate_mean"] == pytest.approx(0.05)
    assert optimizer.param_groups[0]["gate_mean"] == 0.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"noise_radius": float("inf")}, "noise_radius is inf"),
        ({"noise_radius": "big"}, "noise_radius is 'big'"),
        ({"escape_steps": 2.5}, "escape_steps is 2.5; give a whole number"),
        ({"noise_steps": "10"}, "noise_steps is '10'"),
        ({"step_boost": None}, "step_boost is None"),
        ({"boost_steps": None}, "boost_steps is None"),
        ({"lr": None}, "lr is None"),
        ({"gate_beta": "0.9"}, "gate_beta is '0.9'"),
        ({"grad_threshold": float("nan")}, "grad_threshold is nan"),
        ({"grad_threshold": [1.0]}, "grad_threshold"),
        ({"momentum": "0.9"}, "momentum is '0.9'"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"maximize": "yes"}, "maximize is 'yes'"),
        ({"foreach": "yes"}, "foreach is 'yes'; give None or False or True"),
        ({"dampening": float("nan"), "momentum": 0.9}, "dampening is nan"),
        ({"low_precision": "masters"}, "did you mean 'master'"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_the_first_step(settings, message):
    given = {"lr": 0.1, "grad_threshold": 1.0, **settings}
    with pytest.raises(ConfigError, match=message):
        ASGLD([torch.zeros(3, requires_grad=True)], **given)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: SGLD(p, 0.1, temperature=float("nan")), "temperature is nan"),
        (lambda p: SGLD(p, 0.1, temperature=-1.0), "temperature is -1.0"),
        (lambda p: SGLD(p, 0.1, temperature=1.0, low_precision="stochastic"), "heats the chain"),
        (lambda p: PSGLD(p, 0.1, temperature=1.0, alpha=1.0), "alpha"),
        (lambda p: PSGLD(p, 0.1, temperature=1.0, eps=0.0), "eps is 0"),
        (lambda p: PSGLD(p, 0.1, temperature=1.0, adapt_steps=0), "adapt_steps is 0"),
        (lambda p: Perturb(torch.optim.SGD(p, 0.1), mode="constant", noise_radius="x"), "noise_radius"),
        (lambda p: PerturbedGD(p, 0.1, **{**OPEN, "escape_steps": None}), "escape_steps is None"),
        (lambda p: PerturbedGD(p, 0.1, **{**OPEN, "grad_threshold": "auto"}), "grad_threshold is 'auto'"),
    ],
)
def test_samplers_and_perturb_refuse_before_the_first_step_too(make, message):
    with pytest.raises(ConfigError, match=message):
        make([torch.zeros(3, requires_grad=True)])


def test_a_learning_rate_may_be_a_tensor():
    p = torch.ones(3, requires_grad=True)
    optimizer = ASGLD([p], torch.tensor(0.1), **OPEN)
    stepped(optimizer, p)
    model = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_optimizer_state_dict(model, SGLD(model.parameters(), torch.tensor(0.1), temperature=0.1))


@pytest.mark.parametrize("again", [lambda inner: Perturb(inner, grad_threshold=1.0), lambda inner: Perturb(SAM(inner))])
def test_a_second_perturb_around_one_optimizer_is_refused(again):
    inner = torch.optim.SGD([torch.zeros(3, requires_grad=True)], 0.1)
    first = Perturb(inner, grad_threshold=0.5, noise_radius=0.1)
    with pytest.raises(ConfigError, match="perturbed before"):
        again(inner)
    assert first.param_groups[0]["grad_threshold"] == 0.5


def test_the_settings_of_the_inner_optimizer_are_its_own_affair():
    p = torch.ones(3, 4, requires_grad=True)
    optimizer = Perturb(torch.optim.Adafactor([p], 0.1), seed=1, **OPEN)
    stepped(optimizer, p)
    assert isinstance(optimizer.param_groups[0]["eps"], tuple)
    assert optimizer.param_groups[0]["fires"] == 1


def test_perturb_refuses_sparse_gradients_before_anything_has_moved():
    table = torch.nn.Embedding(5, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = Perturb(torch.optim.SGD(table.parameters(), 0.1), grad_threshold=10.0, noise_radius=0.1)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match="sparse"):
        optimizer.step()
    assert torch.equal(table.weight, before)
