"""Token selection: the top share of each sequence, whatever the split of the batch, and the rest never computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import assert_same_gradients, one_step, run_config, save_model

from limbeck.distill.config import LossConfig
from limbeck.distill.scores import (
    divergences,
    keep_top,
    random_scores,
    scaled,
    standardised,
    student_entropy,
    weigh_softly,
)
from limbeck.errors import ConfigError
from limbeck.models.anatomy import Head
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.targets import SeveralTargets
from limbeck.teacher.topk import TopKTargets
from limbeck.traces.supervise import TokenSelection
from limbeck.traces.truncate import share_of

BY = ["random", "teacher_entropy", "student_entropy", "divergence", "student_entropy+divergence", "tip"]


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


@pytest.mark.parametrize("by", BY)
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


@pytest.mark.parametrize("by", BY)
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
    own = -(log_student.exp() * log_student).sum(-1)
    torch.testing.assert_close(student_entropy(student, Head(head, None), 20), own, rtol=1e-5, atol=1e-5)
    ids = torch.arange(20).expand(300, 20)
    topk = TopKTargets(ids, teacher, torch.full((300,), -torch.inf))
    torch.testing.assert_close(topk.entropy(20), entropy, rtol=1e-5, atol=1e-5)
    found = divergences(student, Head(head, None), topk, LossConfig(), 20)
    torch.testing.assert_close(found, kl, rtol=1e-4, atol=1e-4)

    several = SeveralTargets((dense, topk), (0.25, 0.5))
    torch.testing.assert_close(several.entropy(20), 0.75 * entropy, rtol=1e-5, atol=1e-5)
    found = divergences(student, Head(head, None), several, LossConfig(), 20)
    torch.testing.assert_close(found, 0.75 * kl, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", BY)
def test_two_equal_teachers_select_as_one(teacher, by):
    both = {"teacher.weight": 0.25, "teacher.others": [{"model": teacher, "weight": 0.75}]}
    one = one_step(config(teacher, by))
    two = one_step(config(teacher, by, **both), is_counted=True)
    assert two.kd == pytest.approx(one.kd, rel=1e-5)
    assert_same_gradients(two, one, atol=1e-6)
    assert two.ledger.counts["supervised_tokens"] == one.ledger.counts["supervised_tokens"]
    assert sum(two.ledger.flops.values()) == pytest.approx(two.counted_flops, rel=0.02)


OWNER = torch.tensor([0, 0, 0, 0, 1, 1, 1])
ALL = torch.ones(7, dtype=torch.bool)


def test_scores_are_brought_to_one_scale_within_a_sequence():
    scores = torch.tensor([1.0, 3.0, 5.0, 100.0, 7.0, 7.0, 7.0])
    part = ALL.clone()
    part[3] = False
    assert scaled(scores, OWNER, part).tolist() == [0, 0.5, 1, 0, 1, 1, 1]
    z = standardised(scores, OWNER, part)
    assert z.tolist() == pytest.approx([-1.2247, 0, 1.2247, 0, 0, 0, 0], abs=1e-4)


def test_soft_weights_are_in_proportion_and_carry_the_whole_weight():
    scores = torch.tensor([0.0, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0])
    coef = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.2, 0.0, 0.2])
    soft = weigh_softly(scores, OWNER, coef)
    assert soft.tolist() == pytest.approx([0, 0.4 / 7, 0.8 / 7, 1.6 / 7, 0.2, 0, 0.2])


def test_tip_finds_the_unsure_and_the_sure_and_wrong(teacher):
    """Of four positions: unsure, sure and right, sure and wrong, in between; TIP keeps both informative ones."""
    entropy, distance = torch.tensor([2.0, 0.0, 0.0, 0.5]), torch.tensor([0.1, 0.0, 3.0, 0.2])
    owner, part = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    h, d = scaled(entropy, owner, part), scaled(distance, owner, part)
    kept = keep_top(h + d - h * d, owner, torch.ones(4), 0.5)
    assert torch.nonzero(kept)[:, 0].tolist() == [0, 2]
    by_entropy = keep_top(entropy, owner, torch.ones(4), 0.5)
    assert torch.nonzero(by_entropy)[:, 0].tolist() == [0, 3]


def test_random_draws_depend_on_seed_and_sequence_alone(teacher):
    data = one_step(config(teacher, "random")).data.train
    owner = torch.tensor([0] * 5 + [1] * 7)
    scores = random_scores(data[:2], owner, 3)
    assert scores.tolist() == random_scores(data[:2], owner, 3).tolist()
    swapped = random_scores(data[1::-1], torch.tensor([0] * 7 + [1] * 5), 3)
    assert swapped[7:].tolist() == scores[:5].tolist()
    assert random_scores(data[:2], owner, 4).tolist() != scores.tolist()
    many = random_scores(data[:1], torch.zeros(4000, dtype=torch.long), 0)
    assert 0.47 < many.mean() < 0.53 and many.min() >= 0 and many.max() < 1


def test_the_random_twin_keeps_as_many_positions(teacher):
    counts = {by: one_step(config(teacher, by)).ledger.counts["supervised_tokens"] for by in BY}
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize("by", BY)
def test_soft_weights_do_not_depend_on_the_split(teacher, by):
    changes = {"loss.kd_ratio": 0.7, "supervision.select": {"by": by}}
    soft = one_step(run_config({"teacher.model": teacher} | changes), is_counted=True)
    split = one_step(run_config({"teacher.model": teacher} | changes), [[8, 0], [3, 1, 5], [2], [4, 6, 7]])
    assert split.loss == pytest.approx(soft.loss, rel=1e-5)
    assert_same_gradients(split, soft, atol=1e-6)
    assert sum(soft.ledger.flops.values()) == pytest.approx(soft.counted_flops, rel=0.02)
    plain = one_step(run_config({"teacher.model": teacher, "loss.kd_ratio": 0.7}))
    assert abs(soft.kd - plain.kd) > 1e-4


@pytest.mark.parametrize("fraction", [0.0, 1.1, float("nan")])
def test_bad_shares_are_refused(fraction):
    with pytest.raises(ConfigError, match=r"select\.fraction"):
        TokenSelection(by="divergence", fraction=fraction)


def test_without_a_teacher_nothing_is_selected():
    plain = one_step(run_config())
    selecting = one_step(run_config({"supervision.select": {"by": "divergence", "fraction": 0.2}}))
    assert selecting.loss == plain.loss
    assert np.isfinite(plain.loss)
