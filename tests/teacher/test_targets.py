"""Targets of every form answer the same questions: rows, heads, entropies, costs, and the loss of a row."""

import pytest
import torch

from limbeck.distill.divergence import DivergenceConfig
from limbeck.errors import ConfigError, ShapeError
from limbeck.models.anatomy import Head
from limbeck.models.sharded_softmax import WHOLE
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.targets import Distance, SeveralTargets, TargetReader
from limbeck.teacher.topk import TopKTargets

N, D, V, K = 6, 3, 11, 4


def float64(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense():
    return DenseTargets(float64(N, D, seed=1), float64(V, D, seed=2), float64(V, seed=3))


def topk(entries=K):
    log_probs = torch.log_softmax(float64(N, V, seed=4), -1).sort(-1, descending=True)
    kept, ids = log_probs.values[:, :entries], log_probs.indices[:, :entries]
    return TopKTargets(ids, kept, torch.log1p(-kept.exp().sum(-1).clamp(max=1)))


FORMS = {"dense": dense, "topk": topk, "several": lambda: SeveralTargets((dense(), topk()), (0.25, 2.0))}


@pytest.fixture(params=FORMS)
def targets(request):
    return FORMS[request.param]()


@pytest.mark.parametrize("rows", [slice(1, 4), torch.tensor([4, 0]), torch.arange(N) % 2 == 0])
def test_rows_are_taken_from_everything_that_has_one_a_position(targets, rows):
    count = len(torch.arange(N)[rows])
    taken = targets.take(rows)
    assert type(taken) is type(targets) and len(taken) == count
    torch.testing.assert_close(taken.entropy(V), targets.entropy(V)[rows])
    assert N * taken.head_flops(V) == count * targets.head_flops(V)


def test_entropies_are_those_of_the_distributions():
    logits = dense().logits()
    log_probs = torch.log_softmax(logits, -1).float()
    torch.testing.assert_close(dense().entropy(V), -(log_probs.exp() * log_probs).sum(-1), rtol=1e-5, atol=1e-6)
    events = topk().events()
    assert events.shape == (N, K + 1)
    torch.testing.assert_close(events.exp().sum(-1), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(topk().entropy(V), -(events.exp() * events).sum(-1))
    several = FORMS["several"]()
    expected = 0.25 * dense().entropy(V) + 2.0 * topk().entropy(V)
    torch.testing.assert_close(several.entropy(V), expected)


def test_a_single_teacher_is_one_with_a_weight_of_one(targets):
    parts = targets.by_teacher()
    assert [weight for _, weight in parts] == ([0.25, 2.0] if len(parts) > 1 else [1.0])
    assert sum(part.head_flops(V) for part, _ in parts) == targets.head_flops(V)
    assert all(len(part) == N for part, _ in parts)


def test_heads_are_changed_where_there_are_any(targets):
    smaller = targets.map_heads(lambda head: Head(head.weight[:5], head.bias[:5]))
    for (before, _), (after, _) in zip(targets.by_teacher(), smaller.by_teacher(), strict=True):
        if isinstance(before, DenseTargets):
            assert after.head_weight.shape == (5, D) and after.hidden is before.hidden
        else:
            assert after is before


def test_some_entries_of_a_distribution_are_known_of_a_whole_one_only():
    entries = torch.tensor([7, 2])
    torch.testing.assert_close(dense().over(entries).logits(), dense().logits()[:, entries])
    for ask in (lambda: topk().over(entries), topk().logits, lambda: FORMS["several"]().over(entries)):
        with pytest.raises(ConfigError, match="live teacher"):
            ask()


def test_rows_of_several_widths_meet():
    wider = topk().widened(K + 2)
    assert topk().width == K and wider.width == K + 2 and dense().width == 0
    torch.testing.assert_close(wider.entropy(V), topk().entropy(V))
    assert dense().widened(9).hidden.shape == (N, D)


def reader_of(targets, kd_coef, temperature=1.3):
    return targets.reader(kd_coef, V, Distance(DivergenceConfig().bind(), temperature, WHOLE))


@pytest.mark.parametrize("form", ["dense", "topk"])
def test_the_loss_of_a_block_is_that_of_its_rows(form):
    """Value and gradient of rows 1 and 2 of a chunk, against autograd."""
    targets, chunk, coef = FORMS[form](), torch.tensor([5, 0, 3]), torch.rand(2, 1, dtype=torch.float64)
    reader = reader_of(targets, torch.ones(N, dtype=torch.float64))
    reader.allocate(len(chunk))
    reader.read(chunk, torch.zeros(len(chunk), D))
    logits = float64(2, V, seed=5).requires_grad_()
    gradient = logits.detach().clone()
    value = reader.row_loss(slice(1, 3), gradient, None, coef)
    if form == "dense":
        student, teacher = logits, targets.logits()[chunk[1:]]
    else:
        part = targets.take(chunk[1:])
        kept, rest = logits.gather(1, part.ids), logits.scatter(1, part.ids, -torch.inf)
        student, teacher = torch.cat([kept, rest.logsumexp(-1, keepdim=True)], 1), part.events()
    log_s, log_t = (torch.log_softmax(x / 1.3, -1) for x in (student, teacher))
    expected = (log_t.exp() * (log_t - log_s)).sum(-1)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad((coef[:, 0] * expected).sum(), logits)[0])


def test_nothing_is_read_where_no_position_counts():
    blank = TopKTargets(torch.full((N, K), 99), torch.full((N, K), torch.nan), torch.zeros(N))
    coef = torch.zeros(N)
    reader_of(blank, coef)
    coef[2] = 1.0
    with pytest.raises(ShapeError, match="top-k id 99 at row 2"):
        reader_of(blank, coef)
    logits = torch.randn(3, V)
    assert not TargetReader().row_loss(slice(None), logits, None, torch.ones(3, 1)).any() and not logits.any()
    assert TargetReader().row_bytes == 0
