"""What a step of the Langevin family does: gate, noise, boost, momentum, low precision."""

import math

import pytest
import torch

from limbeck.errors import ConfigError
from limbeck.optim import ASG, ASGLD, PSGLD, NoisySGD, PerturbedGD
from limbeck.optim.spread import unit_stds
from limbeck.optim.theory import escape_window


def param(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).requires_grad_()


def take(optimizer, p, grad):
    """One step with a given gradient; what the step added comes back."""
    before = p.detach().clone()
    p.grad = torch.as_tensor(grad, dtype=p.dtype).expand_as(p).clone()
    optimizer.step()
    return p.detach() - before


def test_a_fire_adds_noise_of_the_radius_and_then_waits():
    p = torch.zeros(1000, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=1e-3, noise_radius=0.5, escape_steps=4)
    moved = [float(take(optimizer, p, 0.0).norm()) for _ in range(11)]
    assert [i for i, norm in enumerate(moved) if norm > 0] == [0, 5, 10]
    assert moved[0] == pytest.approx(0.5, rel=0.15)
    stats = optimizer.stats()
    assert (int(stats["fires"]), float(stats["steps_since_fire"])) == (3, 0)
    assert float(stats["noise_norm"]) == pytest.approx(moved[10], rel=1e-4)
    assert float(stats["statistic"]) == 0.0


def test_the_gate_is_shut_above_the_threshold():
    p = param(0.0, 0.0)
    optimizer = ASGLD([p], 0.1, grad_threshold=0.5, noise_radius=1.0)
    assert torch.allclose(take(optimizer, p, [0.4, 0.4]), torch.tensor([-0.04, -0.04]))
    assert float(optimizer.stats()["statistic"]) > 0.5
    assert optimizer.stats()["fires"] == 0
    assert not torch.allclose(take(optimizer, p, [0.3, 0.4]), torch.tensor([-0.03, -0.04]))


def test_a_gradient_of_nan_never_fires():
    p = param(0.0, 0.0)
    optimizer = ASGLD([p], 0.1, grad_threshold=0.5)
    take(optimizer, p, float("nan"))
    assert optimizer.stats()["fires"] == 0


def test_the_default_radius_follows_the_learning_rate():
    p = torch.zeros(4000, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=2.0, escape_steps=0)
    assert float(take(optimizer, p, 0.0).norm()) == pytest.approx(0.2, rel=0.1)
    optimizer.param_groups[0]["lr"] = 0.01
    assert float(take(optimizer, p, 0.0).norm()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("numel", [10, 1000, 10_000])
def test_the_energy_does_not_depend_on_the_dimension(numel):
    p = torch.zeros(numel, requires_grad=True)
    optimizer = ASGLD([p], 0.1, mode="constant", noise_radius=0.3)
    squares = torch.tensor([float(take(optimizer, p, 0.0).square().sum()) for _ in range(80)])
    # ||noise||^2 / r^2 is chi-squared over its d degrees of freedom: variance 2 / d.
    assert float(squares.mean()) / 0.09 == pytest.approx(1.0, abs=5 * math.sqrt(2 / numel / 80))


def test_smooth_noise_shrinks_with_the_statistic():
    p = torch.zeros(5000, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=2.0, noise_radius=1.0, mode="smooth")
    for share in (0.0, 0.3, 0.9, 1.0, 1.5):
        gradient = torch.zeros(5000)
        gradient[0] = 2.0 * share
        noise = take(optimizer, p, gradient) + 0.1 * gradient
        assert float(noise.norm()) == pytest.approx(max(0.0, 1 - share**2), rel=0.06, abs=1e-6)


def test_annealed_noise_falls_with_the_step():
    p = torch.zeros(5000, requires_grad=True)
    optimizer = ASGLD([p], 0.1, noise_radius=1.0, mode="annealed", anneal_power=0.55)
    for step in range(30):
        assert float(take(optimizer, p, 3.0).add(0.3).norm()) == pytest.approx((1 + step) ** -0.275, rel=0.06)


def test_noise_never_enters_the_momentum_buffer():
    p = torch.zeros(50, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=9.0, noise_radius=1.0, momentum=0.9, escape_steps=0)
    expected = torch.zeros(50)
    for _ in range(5):
        expected = 0.9 * expected + 0.01
        assert take(optimizer, p, 0.01).norm() > 0.5
        assert torch.allclose(optimizer.state[p]["momentum_buffer"], expected)


def test_a_fire_can_reset_the_momentum():
    p = torch.zeros(50, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=0.5, momentum=0.9, reset_momentum=True)
    take(optimizer, p, 1.0)
    assert optimizer.state[p]["momentum_buffer"].norm() > 0
    take(optimizer, p, 0.0)
    assert optimizer.state[p]["momentum_buffer"].norm() == 0


def test_sphere_and_ball():
    p = torch.zeros(3, requires_grad=True)
    sphere = ASGLD([p], 0.1, noise_radius=0.7, mode="constant", noise="sphere")
    for _ in range(20):
        assert float(take(sphere, p, 0.0).norm()) == pytest.approx(0.7, rel=1e-5)
    ball = ASGLD([p], 0.1, noise_radius=0.7, mode="constant", noise="ball")
    norms = torch.stack([take(ball, p, 0.0).norm() for _ in range(500)]) / 0.7
    assert norms.max() <= 1 + 1e-5
    # The cube of the norm is uniform in three dimensions.
    assert abs(float((norms**3).mean()) - 0.5) < 5 / math.sqrt(12 * 500)


def test_the_sphere_spans_all_groups():
    p, q = torch.zeros(30, requires_grad=True), torch.zeros(10, requires_grad=True)
    optimizer = NoisySGD([{"params": [p]}, {"params": [q]}], 0.5)
    p.grad, q.grad = torch.zeros(30), torch.zeros(10)
    optimizer.step()
    assert math.hypot(float(p.detach().norm()), float(q.detach().norm())) == pytest.approx(0.5, rel=1e-5)


def test_relative_noise_shares_the_energy_by_squared_norm():
    p, q, zero = (torch.full((n,), v).requires_grad_() for n, v in ((2000, 3.0), (8000, 1.0), (100, 0.0)))
    optimizer = ASGLD([p, q, zero], 0.1, mode="constant", noise_radius=1.0, noise_scale="relative")
    before = [t.detach().clone() for t in (p, q, zero)]
    for t in (p, q, zero):
        t.grad = torch.zeros_like(t)
    optimizer.step()
    moved = [float((t.detach() - b).norm()) for t, b in zip((p, q, zero), before, strict=True)]
    total = 2000 * 9 + 8000
    assert moved[0] == pytest.approx(math.sqrt(18000 / total), rel=0.06)
    assert moved[1] == pytest.approx(math.sqrt(8000 / total), rel=0.06)
    assert moved[2] == 0.0


def test_relative_noise_over_zero_parameters_is_even():
    optimizer = ASGLD([param(0.0, 0.0), param(0.0)], 0.1, mode="constant", noise_radius=1.0, noise_scale="relative")
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    blocks = optimizer._gather()
    stds = unit_stds(blocks, blocks, "relative")
    assert next(iter(stds.values())) == [1 / math.sqrt(3)] * 2


def test_coordinate_noise_has_the_same_size_in_every_dimension():
    p = torch.zeros(20_000, requires_grad=True)
    optimizer = ASGLD([p], 0.1, mode="constant", noise_radius=0.3, noise_scale="coordinate")
    assert float(take(optimizer, p, 0.0).std()) == pytest.approx(0.3, rel=0.03)


def test_the_boost_covers_the_steps_after_a_fire():
    p = param(0.0)
    optimizer = ASG([p], 0.1, grad_threshold=1.0, escape_steps=4, step_boost=10.0, boost_steps=2)
    moved, announced = [], []
    for _ in range(7):
        announced.append(bool(optimizer.stats()["boosted_next"]))
        moved.append(round(float(take(optimizer, p, 1.0)), 5))
    assert moved == [-0.1, -1.0, -1.0, -0.1, -0.1, -0.1, -1.0]
    assert announced == [False, True, True, False, False, False, True]


def test_noise_steps_ends_noise_and_boost():
    p = torch.zeros(50, requires_grad=True)
    optimizer = ASGLD([p], 0.1, mode="constant", noise_radius=1.0, noise_steps=3)
    assert [bool(take(optimizer, p, 0.0).norm() > 0) for _ in range(5)] == [True] * 3 + [False] * 2


def test_splitting_a_group_changes_no_bit():
    def run(groups):
        shapes = ((7,), (3, 2), (5,))
        params = [torch.arange(float(math.prod(s))).view(s).mul(0.1).requires_grad_() for s in shapes]
        optimizer = ASGLD(groups(params), 0.05, grad_threshold=5.0, mode="smooth", noise_radius=0.1, seed=5)
        for _ in range(10):
            for p in params:
                p.grad = p.detach() * 0.5
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in params])

    whole = run(lambda params: params)
    assert torch.equal(whole, run(lambda p: [{"params": p[:1]}, {"params": p[1:]}]))
    named = run(lambda p: [("a", p[0]), ("b", p[1]), ("c", p[2])])
    assert torch.equal(named, run(lambda p: [{"params": [("c", p[2])]}, {"params": [("b", p[1]), ("a", p[0])]}]))
    assert not torch.equal(named, whole)


def test_a_group_without_noise_stays_out_of_the_domain():
    p, q = torch.zeros(4000, requires_grad=True), torch.zeros(9000, requires_grad=True)
    optimizer = ASGLD([{"params": [p]}, {"params": [q], "noise_radius": 0.0}], 0.1, mode="constant", noise_radius=1.0)
    p.grad, q.grad = torch.zeros(4000), torch.zeros(9000)
    optimizer.step()
    assert float(p.detach().norm()) == pytest.approx(1.0, rel=0.06)
    assert float(q.detach().norm()) == 0.0


def test_parameters_without_a_gradient_do_not_move():
    p, unused = torch.zeros(100, requires_grad=True), torch.ones(5, requires_grad=True)
    optimizer = ASGLD([p, unused], 0.1, mode="constant", noise_radius=1.0, weight_decay=0.1)
    take(optimizer, p, 0.0)
    assert torch.equal(unused.detach(), torch.ones(5))


@pytest.mark.parametrize("mode", ["gated", "smooth", "annealed", "constant"])
def test_a_learning_rate_of_zero_freezes(mode):
    p = param(1.0, 2.0)
    optimizer = ASGLD([p], 0.1, grad_threshold=9.0, noise_radius=1.0, mode=mode, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    assert take(optimizer, p, 0.0).norm() == 0
    assert optimizer.stats()["fires"] == 0


def test_weight_decay_is_decoupled():
    p = param(2.0, -4.0)
    optimizer = ASGLD([p], 0.1, grad_threshold=1e-9, weight_decay=0.5)
    assert torch.allclose(take(optimizer, p, 1.0), torch.tensor([-0.2, 0.1]))


def test_the_escape_window_is_the_default_wait():
    p = torch.zeros(10, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=1.0, noise_radius=1e-6)
    fired = [bool(take(optimizer, p, 0.0).norm() > 0) for _ in range(escape_window(10) + 2)]
    assert [i for i, f in enumerate(fired) if f] == [0, 56]


def test_the_automatic_threshold_follows_the_gradient():
    p = torch.zeros(10, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold="auto", escape_steps=0)
    for _ in range(30):
        take(optimizer, p, 1.0)
    assert optimizer.stats()["fires"] == 0
    assert optimizer.param_groups[0]["gate_median"] == pytest.approx(math.sqrt(10), rel=0.06)
    take(optimizer, p, 0.05)
    assert optimizer.stats()["fires"] == 1


def test_the_ema_gate_sees_through_alternating_gradients():
    p = torch.zeros(10, requires_grad=True)
    make = {"grad_threshold": 0.4, "noise_radius": 1e-3, "escape_steps": 1000}
    plain, averaged = ASGLD([p], 1e-3, **make), ASGLD([p], 1e-3, gate="ema", gate_beta=0.9, **make)
    for step in range(60):
        for optimizer in (plain, averaged):
            take(optimizer, p, 1.0 if step % 2 else -1.0)
    assert plain.stats()["fires"] == 0
    assert averaged.stats()["fires"] == 1
    assert "gradient_ema" in averaged.state[p]


def test_the_ema_gate_shares_the_momentum_buffer():
    p = torch.zeros(4, requires_grad=True)
    optimizer = ASGLD([p], 1e-9, grad_threshold=1e9, noise_radius=1e-9, gate="ema", momentum=0.9)
    gradients = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    average = torch.zeros(4)
    for step, gradient in enumerate(gradients, 1):
        take(optimizer, p, gradient)
        average = 0.9 * average + 0.1 * gradient
        expected = float((average / (1 - 0.9**step)).norm())
        assert float(optimizer.stats()["statistic"]) == pytest.approx(expected, rel=1e-5)
    assert list(optimizer.state[p]) == ["momentum_buffer", "momentum_weight"]


def test_the_default_mode_keeps_no_state_for_a_parameter():
    p = torch.zeros(10, requires_grad=True)
    optimizer = ASGLD([p], 0.1, grad_threshold=1.0)
    for _ in range(3):
        take(optimizer, p, 0.0)
    assert not optimizer.state[p]


def test_bf16_noise_and_descent_are_rounded_once_and_keep_their_mean():
    """lr * g is a twentieth of the rounding step at 1, so plain rounding would lose every step."""
    p = torch.ones(60_000, dtype=torch.bfloat16, requires_grad=True)
    spread = math.sqrt(2 * 1e-4 * 1e-2)
    optimizer = ASGLD([p], 1e-4, mode="constant", noise_scale="coordinate", noise_radius=spread)
    for _ in range(20):
        p.grad = torch.full_like(p, 4.0)
        optimizer.step()
    drift = float(p.detach().double().mean()) - 1
    assert drift == pytest.approx(-20 * 4e-4, abs=5 * 0.0078 * math.sqrt(20 / 4 / 60_000))
    nearest = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
    lost = ASGLD([nearest], 1e-4, mode="constant", noise_radius=1e-6, low_precision="nearest")
    nearest.grad = torch.full_like(nearest, 4.0)
    with pytest.warns(UserWarning, match="below a quarter of the rounding step"):
        lost.step()
    assert torch.equal(nearest.detach(), torch.ones(1000, dtype=torch.bfloat16))


def test_float32_masters_survive_a_checkpoint():
    def step(optimizer, p):
        p.grad = torch.full_like(p, 4.0)
        optimizer.step()

    p = torch.ones(100, dtype=torch.bfloat16, requires_grad=True)
    optimizer = ASGLD([p], 1e-5, mode="constant", noise_radius=4e-5, low_precision="master", seed=5)
    for _ in range(50):
        step(optimizer, p)
    master = optimizer.state[p]["master"]
    assert master.dtype == torch.float32
    assert float(master.mean()) == pytest.approx(1 - 50 * 4e-5, abs=2e-5)
    assert torch.equal(p.detach(), master.bfloat16())
    again = p.detach().clone().requires_grad_()
    resumed = ASGLD([again], 1e-5, mode="constant", noise_radius=4e-5, low_precision="master")
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(50):
        step(optimizer, p)
        step(resumed, again)
    assert torch.equal(resumed.state[again]["master"], optimizer.state[p]["master"])


def test_psgld_adds_the_divergence_of_its_preconditioner():
    p = torch.tensor([0.5, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    alpha, eps, lr, temperature = 0.8, 1e-3, 0.01, 0.4

    def gradient(x):
        return torch.autograd.grad((x**4).sum() / 4, x, create_graph=True)[0]

    square_avg = torch.tensor([0.3, 0.1, 0.7], dtype=torch.float64)
    x = p.detach().clone().requires_grad_()
    scale = 1 / (eps + (alpha * square_avg + (1 - alpha) * gradient(x) ** 2).sqrt())
    divergence = torch.autograd.grad(scale.sum(), x)[0]
    moved = {}
    for correction in (True, False):
        q = p.detach().clone().requires_grad_()
        optimizer = PSGLD([q], lr, temperature=temperature, alpha=alpha, eps=eps, correction=correction, seed=5)
        # An average over so many gradients that its bias correction is 1.
        optimizer.state[q].update(square_avg=square_avg.clone(), square_avg_steps=500, square_avg_weight=1.0)
        (q**4).sum().div(4).backward(create_graph=True)
        optimizer.step()
        moved[correction] = q.detach().clone()
    # The noise is the same in both, so that only the term is left. The Hessian is diagonal: the estimate is exact.
    assert torch.allclose(moved[True] - moved[False], lr * temperature * divergence, rtol=1e-9, atol=1e-12)


def test_psgld_asks_for_the_graph_that_its_correction_needs():
    p = param(1.0)
    optimizer = PSGLD([p], 0.1, temperature=1.0, correction=True)
    p.grad = torch.ones(1)
    with pytest.raises(ConfigError, match="create_graph=True"):
        optimizer.step()


def test_perturbed_gd_returns_to_the_point_that_no_kick_can_leave():
    p = param(0.0, 0.0)
    optimizer = PerturbedGD([p], 0.1, grad_threshold=0.01, noise_radius=0.3, escape_steps=10, loss_drop=1e-3)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    steps = 0
    while not optimizer.converged and steps < 50:
        optimizer.step(closure)
        steps += 1
    assert steps == 11
    assert torch.equal(p.detach(), torch.zeros(2))
    optimizer.step(closure)
    assert torch.equal(p.detach(), torch.zeros(2))


def test_perturbed_gd_goes_on_where_a_kick_leaves_a_saddle():
    p = param(0.0, 0.0)
    optimizer = PerturbedGD([p], 0.2, grad_threshold=0.01, noise_radius=0.05, escape_steps=40, loss_drop=1e-3)

    def closure():
        optimizer.zero_grad()
        loss = -(p[0] ** 2) / 2 + p[0] ** 4 / 4 + p[1] ** 2 / 2
        loss.backward()
        return loss

    for _ in range(400):
        optimizer.step(closure)
        if optimizer.converged:
            break
    assert optimizer.converged
    assert abs(p[0].item()) == pytest.approx(1.0, abs=1e-3)


def test_from_constants_fills_in_the_theory():
    p = torch.zeros(50, requires_grad=True)
    optimizer = ASGLD.from_constants([p], L=2.0, rho=1.0, eps=0.1, delta=0.1, delta_f=1.0, seed=4)
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.5
    assert group["noise_radius"] == pytest.approx(group["grad_threshold"] / 2)
    assert group["seed"] == 4


def test_a_step_off_the_host_never_waits_for_a_value(monkeypatch):
    """The meta device raises at any read of a value, so it stands for an accelerator here."""
    monkeypatch.setattr(
        "limbeck.optim.noise.gaussian_chunk", lambda key, chunk, n, device: torch.empty(n, device=device)
    )
    for settings in (
        {"grad_threshold": 1.0},
        {"grad_threshold": 1.0, "momentum": 0.9, "gate": "ema", "step_boost": 10.0},
        {"grad_threshold": 1.0, "mode": "smooth", "noise": "sphere"},
        {"grad_threshold": "auto", "noise_scale": "relative", "reset_momentum": True, "momentum": 0.9},
        {"noise_radius": 1.0, "gate": "snr"},
    ):
        p = torch.zeros(300, device="meta", requires_grad=True)
        optimizer = ASGLD([p], 0.1, **settings)
        for _ in range(3):
            p.grad = torch.zeros_like(p)
            if settings.get("gate") == "snr":
                optimizer.observe(p.grad.sum())
            optimizer.step()
        assert optimizer.stats()["fires"].device.type == "meta"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "needs grad_threshold"),
        ({"mode": "constant"}, "needs noise_radius"),
        ({"mode": "gate", "grad_threshold": 1.0}, "did you mean 'gated'"),
        ({"grad_threshold": -1.0}, "must be positive"),
        ({"grad_threshold": "big"}, "a number or 'auto'"),
        ({"grad_threshold": 1.0, "noise_radius": -1.0}, "must not be negative"),
        ({"grad_threshold": 1.0, "gate_beta": 1.0}, "lies in"),
        ({"grad_threshold": 1.0, "momentum": -0.1}, "must not be negative"),
        ({"grad_threshold": 1.0, "nesterov": True}, "nesterov needs"),
        ({"mode": "constant", "noise_radius": 1.0, "noise": "ball", "noise_scale": "coordinate"}, "fixed norm"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ASGLD([param(0.0)], 0.1, **settings)


def test_settings_of_the_whole_optimizer_cannot_differ_between_groups():
    groups = [{"params": [param(0.0)]}, {"params": [param(0.0)], "noise": "sphere"}]
    with pytest.raises(ConfigError, match="must be the same"):
        ASGLD(groups, 0.1, mode="constant", noise_radius=1.0)
