"""Token selection: the top share of each sequence, whatever the split of the batch, and the rest never computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import assert_same_gradients, one_step, run_config, save_model

from limbeck.distill.config import LossConfig
from limbeck.distill.selection import divergences, keep_top
from limbeck.errors import ConfigError
from limbeck.models.anatomy import Head
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.targets import SeveralTargets
from limbeck.teacher.topk import TopKTargets
from limbeck.traces.supervise import TokenSelection
from limbeck.traces.truncate import share_of


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher") / "model", sharpness=30.0)


def config(teacher, by, fraction=0.3, **changes):
    tree = {"teacher.model": teacher, "loss.kd_ratio": 1.0, "supervision.select": {"by": by, "fraction": fraction}}
    return run_config(tree | changes)


@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    fraction=st.floats(0.01, 1.0),
)
def test_the_best_of_each_sequence_carry_its_whole_weight(data, lengths, fraction):
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=len(owner), max_size=len(owner)))).float()
    coef = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=len(owner), max_size=len(owner))))
    kept = keep_top(scores, owner, coef, fraction)
    for sequence in range(len(lengths)):
        mine = owner == sequence
        possible = torch.nonzero(mine & (coef != 0))[:, 0].tolist()
        best = sorted(possible, key=lambda i: (-scores[i].item(), i))[: share_of(len(possible), fraction)]
        assert set(torch.nonzero(mine & (kept != 0))[:, 0].tolist()) == set(best)
        assert kept[mine].sum().item() == pytest.approx(coef[mine].sum().item(), rel=1e-5)
        if best:
            factors = kept[best] / coef[best]
            assert factors.max().item() == pytest.approx(factors.min().item(), rel=1e-5)


@pytest.mark.parametrize("by", ["teacher_entropy", "divergence"])
@pytest.mark.parametrize("normalization", ["token_mean", "sequence_mean"])
def test_split_and_layout_change_nothing(teacher, by, normalization):
    changes = {"loss.normalization": normalization, "loss.kd_ratio": 0.7}
    whole = one_step(config(teacher, by, **changes))
    split = one_step(config(teacher, by, **changes), [[8, 0], [3, 1, 5], [2], [4, 6, 7]])
    padded = one_step(config(teacher, by, **changes, **{"training.layout": "padded"}))
    for other in (split, padded):
        assert other.loss == pytest.approx(whole.loss, rel=1e-5)
        assert_same_gradients(other, whole, atol=1e-6)
    everything = one_step(config(teacher, by, fraction=1.0, **changes))
    plain = one_step(run_config({"teacher.model": teacher, **changes}))
    assert everything.loss == pytest.approx(plain.loss, rel=1e-6)
    assert_same_gradients(everything, plain, atol=1e-6)
    assert abs(whole.kd - plain.kd) > 1e-3 and whole.ce == pytest.approx(plain.ce, rel=1e-5)


@pytest.mark.parametrize("by", ["teacher_entropy", "divergence"])
def test_unselected_rows_skip_the_head(teacher, by):
    step = one_step(config(teacher, by), is_counted=True)
    positions = [int((e.kd_weight > 0).sum()) for e in step.data.train]
    assert step.ledger.counts["supervised_tokens"] == sum(share_of(n, 0.3) for n in positions)
    assert sum(step.ledger.flops.values()) == pytest.approx(step.counted_flops, rel=0.02)


def test_scores_are_those_of_the_formulas():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, student, head = randn(300, 8), randn(20, 8), randn(300, 6), randn(20, 6)
    dense = DenseTargets(hidden, weight)
    teacher = torch.log_softmax(hidden @ weight.T, -1)
    entropy = -(teacher.exp() * teacher).sum(-1)
    torch.testing.assert_close(dense.entropy(20), entropy, rtol=1e-5, atol=1e-5)
    log_student = torch.log_softmax(student @ head.T, -1)
    kl = (teacher.exp() * (teacher - log_student)).sum(-1)
    found = divergences(student, Head(head, None), dense, LossConfig(), 20)
    torch.testing.assert_close(found, kl, rtol=1e-4, atol=1e-5)
    ids = torch.arange(20).expand(300, 20)
    topk = TopKTargets(ids, teacher, torch.full((300,), -torch.inf))
    torch.testing.assert_close(topk.entropy(20), entropy, rtol=1e-5, atol=1e-5)
    found = divergences(student, Head(head, None), topk, LossConfig(), 20)
    torch.testing.assert_close(found, kl, rtol=1e-4, atol=1e-4)

    several = SeveralTargets((dense, topk), (0.25, 0.5))
    torch.testing.assert_close(several.entropy(20), 0.75 * entropy, rtol=1e-5, atol=1e-5)
    found = divergences(student, Head(head, None), several, LossConfig(), 20)
    torch.testing.assert_close(found, 0.75 * kl, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", ["teacher_entropy", "divergence"])
def test_two_equal_teachers_select_as_one(teacher, by):
    both = {"teacher.weight": 0.25, "teacher.others": [{"model": teacher, "weight": 0.75}]}
    one = one_step(config(teacher, by))
    two = one_step(config(teacher, by, **both), is_counted=True)
    assert two.kd == pytest.approx(one.kd, rel=1e-5)
    assert_same_gradients(two, one, atol=1e-6)
    assert two.ledger.counts["supervised_tokens"] == one.ledger.counts["supervised_tokens"]
    assert sum(two.ledger.flops.values()) == pytest.approx(two.counted_flops, rel=0.02)


@pytest.mark.parametrize("fraction", [0.0, 1.1, float("nan")])
def test_bad_shares_are_refused(fraction):
    with pytest.raises(ConfigError, match=r"select\.fraction"):
        TokenSelection(by="divergence", fraction=fraction)


def test_without_a_teacher_nothing_is_selected():
    plain = one_step(run_config())
    selecting = one_step(run_config({"supervision.select": {"by": "divergence", "fraction": 0.2}}))
    assert selecting.loss == plain.loss
    assert np.isfinite(plain.loss)
