"""Losses of predictive distillation: against autograd in float64, and against what they are meant to be."""

import pytest
import torch

from limbeck.distill.divergence import DIVERGENCES, DivergenceConfig
from limbeck.distill.fused import fused_loss
from limbeck.errors import ConfigError
from limbeck.models.anatomy import Head
from limbeck.models.logits import logits_of
from limbeck.ranking.featurize import Labels
from limbeck.ranking.loss import label_head, listwise_divergence, log_odds
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.targets import SeveralTargets
from limbeck.teacher.topk import TopKTargets

LABELS = Labels(yes=5, no=2)
FORMULAS = {
    "forward_kl": lambda s, t, c: (t * (t.log() - s.log())).sum(-1),
    "reverse_kl": lambda s, t, c: (s * (s.log() - t.log())).sum(-1),
    "jsd": lambda s, t, c: (
        (1 - c.beta) * (t * (t / (c.beta * t + (1 - c.beta) * s)).log()).sum(-1)
        + c.beta * (s * (s / (c.beta * t + (1 - c.beta) * s)).log()).sum(-1)
    ),
    "tvd": lambda s, t, c: (s - t).abs().sum(-1) / 2,
}


def float64(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(with_bias):
    student = Head(float64(9, 4, seed=1).requires_grad_(), float64(9, seed=2).requires_grad_() if with_bias else None)
    return student, DenseTargets(float64(6, 3, seed=3), float64(9, 3, seed=4), float64(9, seed=5))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_label_terms_are_those_over_two_renormalised_tokens(name, temperature, with_bias):
    config = DivergenceConfig(name=name, **({"beta": 0.3} if name == "jsd" else {}))
    hidden, (head, targets) = float64(6, 4, seed=6).requires_grad_(), heads(with_bias)
    yes = torch.tensor([True, False, True, True, False, False])
    ce_coef, kd_coef = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    small = label_head(head, LABELS)
    loss = fused_loss(
        hidden,
        small.weight,
        (~yes).long(),
        head_bias=small.bias,
        ce_coef=ce_coef,
        kd_coef=kd_coef,
        targets=targets.over(torch.tensor(LABELS)),
        divergence=config,
        temperature=temperature,
    )
    inputs = [hidden, head.weight, *([head.bias] if with_bias else [])]
    found = torch.autograd.grad(loss.total, inputs)

    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    theirs = torch.nn.functional.linear(targets.hidden, targets.head_weight, targets.head_bias)
    # Restricting and renormalising the whole softmax, as one would write it down.
    both = torch.softmax(logits, -1)[:, [5, 2]]
    both = both / both.sum(-1, keepdim=True)
    tempered, teacher = (torch.softmax(z / temperature, -1)[:, [5, 2]] for z in (logits, theirs))
    tempered, teacher = (x / x.sum(-1, keepdim=True) for x in (tempered, teacher))
    ce = -both[torch.arange(6), (~yes).long()].log()
    kd = temperature**2 * FORMULAS[name](tempered, teacher, config)
    expected = (ce_coef * ce + kd_coef * kd).sum()
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    others = [row for row in range(9) if row not in LABELS]
    assert not found[1][others].any() and found[1][list(LABELS)].any()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_listwise_is_the_divergence_within_each_request(name, temperature):
    config = DivergenceConfig(name=name, **({"beta": 0.3} if name == "jsd" else {}))
    scores, teacher = float64(7, seed=1).requires_grad_(), float64(7, seed=2)
    owner = torch.tensor([1, 0, 1, 2, 1, 0, 1])
    values = listwise_divergence(scores, teacher, owner, config.bind(), temperature)
    weights = torch.tensor([0.7, 2.0, 3.0], dtype=torch.float64)
    found = torch.autograd.grad((weights * values).sum(), scores)[0]
    expected = []
    for request in range(3):
        rows = owner == request
        parts = (torch.softmax(x[rows] / temperature, -1) for x in (scores, teacher))
        expected.append(FORMULAS[name](*parts, config))
    expected = torch.stack(expected)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, torch.autograd.grad((weights * expected).sum(), scores)[0], rtol=1e-8, atol=1e-10)
    assert values[2] == 0  # one candidate


@pytest.mark.parametrize("name", DIVERGENCES)
def test_listwise_passes_the_finite_difference_check(name):
    divergence = DivergenceConfig(name=name).bind()
    teacher, owner = float64(6, seed=3), torch.tensor([0, 1, 1, 0, 1, 1])
    scores = float64(6, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: listwise_divergence(s, teacher, owner, divergence), scores)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_listwise_sees_differences_only(name):
    divergence, owner = DivergenceConfig(name=name).bind(), torch.tensor([0, 0, 0, 1, 1])
    teacher = float64(5, seed=1)
    shifted = teacher + torch.tensor([3.0, 3, 3, -7, -7])
    same = listwise_divergence(shifted, teacher, owner, divergence)
    torch.testing.assert_close(same, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    one = listwise_divergence(float64(5, seed=2), teacher, owner, divergence)
    other = listwise_divergence(float64(5, seed=2) + 5, teacher, owner, divergence)
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_log_odds_are_the_difference_of_two_logits():
    hidden, (head, _) = float64(6, 4), heads(True)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    torch.testing.assert_close(log_odds(logits_of(hidden, label_head(head, LABELS))), logits[:, 5] - logits[:, 2])


def test_teachers_of_several_kinds():
    _, dense = heads(True)
    entries = torch.tensor(LABELS)
    several = SeveralTargets((dense, dense), (0.5, 1.5)).over(entries)
    assert several.weights == (0.5, 1.5) and several.parts[1].head_weight.shape == (2, 3)
    torch.testing.assert_close(log_odds(dense.over(entries).logits()), log_odds(dense.logits()[:, list(LABELS)]))


def test_a_teacher_that_keeps_its_likeliest_entries_speaks_of_the_labels_where_it_kept_both():
    _, dense = heads(True)
    kept = torch.log_softmax(dense.logits(), -1).topk(9)
    whole = TopKTargets(kept.indices, kept.values, torch.full((6,), -torch.inf))
    entries = torch.tensor(LABELS)
    found, live = (targets.over(entries).logits().log_softmax(-1) for targets in (whole, dense))
    torch.testing.assert_close(found, live)
    padded = TopKTargets(kept.indices, kept.values.clone(), whole.log_tail)
    padded.log_probs[2][kept.indices[2] == LABELS.no] = -torch.inf
    with pytest.raises(ConfigError, match=r"at 1 of 6 positions .* not all of the labels \[5, 2\]"):
        padded.over(entries)
    with pytest.raises(ConfigError, match="live teacher"):
        whole.logits()
