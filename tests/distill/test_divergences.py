"""What every divergence must do. A new one gets all of these by a row in CONFIGS."""

import pytest
import torch
from dense_twin import twin_divergence

from limbeck.distill.divergence import DIVERGENCES, DivergenceConfig
from limbeck.errors import ConfigError

CONFIGS = [
    DivergenceConfig(name="forward_kl"),
    DivergenceConfig(name="reverse_kl"),
    *(DivergenceConfig(name="jsd", beta=beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
    *(DivergenceConfig(name="skew_kl", skew_alpha=alpha) for alpha in (0.0, 0.1, 0.9)),
    *(DivergenceConfig(name="skew_reverse_kl", skew_alpha=alpha) for alpha in (0.0, 0.1, 0.9)),
    DivergenceConfig(name="tvd"),
    *(DivergenceConfig(name="combined_kl", forward_ratio=ratio) for ratio in (0.0, 0.3, 1.0)),
]
every_divergence = pytest.mark.parametrize("config", CONFIGS, ids=str)


def log_probs(*shape: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def test_configs_cover_the_table():
    assert {config.name for config in CONFIGS} == set(DIVERGENCES)


@every_divergence
def test_value_and_gradient_are_those_of_the_definition(config):
    student, teacher = log_probs(6, 11, seed=0).requires_grad_(), log_probs(6, 11, seed=1)
    value, gradient = config.bind()(student.detach(), teacher)
    expected = torch.stack([twin_divergence(s, t, config) for s, t in zip(student, teacher, strict=True)])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    assert value.shape == (6,) and gradient.shape == (6, 11)
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


@every_divergence
def test_zero_with_no_push_on_the_logits_when_student_is_teacher(config):
    same = log_probs(4, 9, seed=2)
    value, gradient = config.bind()(same, same.clone())
    by_logits = gradient - same.exp() * gradient.sum(-1, keepdim=True)
    assert value.abs().max() < 1e-14
    assert by_logits.abs().max() < 1e-14


@every_divergence
def test_inputs_are_left_alone(config):
    student, teacher = log_probs(3, 5, seed=3), log_probs(3, 5, seed=4)
    before = student.clone(), teacher.clone()
    config.bind()(student, teacher)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_and_finite_at_logit_gaps_of_200(config, dtype):
    logits = torch.tensor([[200.0, 0.0, -200.0], [0.0, 0.0, 200.0], [200.0, 200.0, 0.0]], dtype=torch.float64)
    student, teacher = logits.log_softmax(-1), logits.flip(0, 1).log_softmax(-1)
    value, gradient = config.bind()(student.to(dtype), teacher.to(dtype))
    exact = torch.stack([twin_divergence(s, t, config) for s, t in zip(student, teacher, strict=True)])
    assert value.dtype == gradient.dtype == dtype
    assert gradient.isfinite().all()
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)


@every_divergence
def test_float32_is_close_over_a_large_vocabulary(config):
    student, teacher = log_probs(2, 50_000, seed=5), log_probs(2, 50_000, seed=6)
    value, gradient = config.bind()(student.float(), teacher.float())
    exact, exact_gradient = config.bind()(student, teacher)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-8)


@every_divergence
def test_entries_that_neither_side_holds_change_nothing(config):
    student, teacher = log_probs(3, 7, seed=7), log_probs(3, 7, seed=8)
    value, gradient = config.bind()(student, teacher)
    nothing = torch.full((3, 4), -torch.inf, dtype=torch.float64)
    padded, padded_gradient = config.bind()(torch.cat([student, nothing], 1), torch.cat([teacher, nothing], 1))
    torch.testing.assert_close(padded, value, rtol=0, atol=1e-14)
    torch.testing.assert_close(padded_gradient, torch.cat([gradient, torch.zeros_like(nothing)], 1))


@every_divergence
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_finite_where_one_side_excludes_what_the_other_holds(config, who):
    holds, excludes = log_probs(2, 6, seed=9), log_probs(2, 6, seed=10)
    excludes[:, 2] = -torch.inf
    excludes = excludes.log_softmax(-1)
    student, teacher = (holds, excludes) if who == "teacher" else (excludes, holds)
    value, gradient = config.bind()(student.float(), teacher.float())
    assert value.isfinite().all() and gradient.isfinite().all()
    assert (value > 0).all()


def test_forward_kl_ignores_what_the_teacher_excludes():
    student, teacher = log_probs(1, 6, seed=11), log_probs(1, 6, seed=12)
    teacher[:, 2] = -torch.inf
    teacher = teacher.log_softmax(-1)
    value, gradient = DivergenceConfig(name="forward_kl").bind()(student, teacher)
    kept = torch.tensor([0, 1, 3, 4, 5])
    expected = (teacher.exp() * (teacher - student))[:, kept].sum(-1)
    torch.testing.assert_close(value, expected)
    assert gradient[0, 2] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "foward_kl"}, "did you mean 'forward_kl'"),
        ({"beta": -0.1}, r"beta is -0.1; expected a number in \[0, 1\]"),
        ({"beta": 1.5}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"skew_alpha": 1.0}, r"skew_alpha is 1.0; expected a number in \[0, 1\)"),
        ({"skew_alpha": 7.0}, "skew_alpha"),
        ({"forward_ratio": 2.0}, "forward_ratio"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        DivergenceConfig(**fields)
