"""CE where the teacher may stop: which positions that is, what becomes of their weight, in every form of targets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import assert_same_gradients, one_step, run_config, save_model

from limbeck.distill.borders import borders_of, moved
from limbeck.errors import ConfigError
from limbeck.models.tiny import symbol_tokenizer
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.targets import SeveralTargets
from limbeck.teacher.topk import TopKTargets
from limbeck.traces.render import RenderConfig
from limbeck.traces.supervise import BorderConfig

PROBABILITY = st.floats(0, 1, width=32)


@given(st.lists(st.tuples(PROBABILITY, PROBABILITY, PROBABILITY), min_size=1), st.sampled_from([1 / 32, 1 / 8, 3 / 8]))
def test_weight_is_taken_at_borders_and_nowhere_else(rows, delta):
    ce, kd, p_end = map(torch.tensor, zip(*rows, strict=True))
    left, same = moved(ce, kd, p_end, delta, "none")
    _, more = moved(ce, kd, p_end, delta, "kd")
    for i, p in enumerate(p_end.tolist()):
        is_border = delta <= p <= 1 - delta
        assert left[i] == (0 if is_border else ce[i])
        assert same[i] == kd[i] and more[i] == (kd[i] + ce[i] if is_border else kd[i])


def test_all_forms_know_how_likely_an_end_is():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 8, generator=generator), torch.randn(20, 8, generator=generator)
    teacher = torch.log_softmax(hidden @ weight.T, -1)
    ends = torch.tensor([3, 17])
    expected = teacher[:, ends].exp().sum(-1)
    dense = DenseTargets(hidden, weight)
    torch.testing.assert_close(dense.probability_of(ends, 20), expected, rtol=1e-5, atol=1e-6)
    values, ids = teacher.topk(6)
    topk = TopKTargets(ids, values, torch.log1p(-values.exp().sum(-1)))
    named = torch.where((ids == 3) | (ids == 17), values.exp(), 0.0).sum(-1)
    torch.testing.assert_close(topk.probability_of(ends, 20), named)
    both = SeveralTargets((dense, dense), (0.5, 1.5)).probability_of(ends, 20)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-6)


def test_an_end_is_the_marker_or_the_end_of_turn():
    tokenizer = symbol_tokenizer()
    borders = borders_of(BorderConfig(), tokenizer, RenderConfig())
    names = tokenizer.convert_ids_to_tokens(borders.end_ids.tolist())
    assert "</think>" in names and "<|im_end|>" in names
    assert borders_of(None, tokenizer, RenderConfig()) is None


@pytest.mark.parametrize("ce", ["none", "kd"])
def test_split_and_layout_change_nothing_and_the_cost_is_counted(tmp_path, ce):
    # A random teacher is unsure everywhere, so that many positions are borders.
    teacher = save_model(tmp_path / "teacher", sharpness=30.0)
    changes = {"teacher.model": teacher, "loss.kd_ratio": 0.5}
    with_borders = {**changes, "supervision.borders": {"ce": ce, "probability": 0.02}}
    whole = one_step(run_config(with_borders), is_counted=True)
    split = one_step(run_config(with_borders), [[8, 0], [3, 1, 5], [2], [4, 6, 7]])
    padded = one_step(run_config({**with_borders, "training.layout": "padded"}))
    for other in (split, padded):
        assert other.loss == pytest.approx(whole.loss, rel=1e-5)
        assert_same_gradients(other, whole, atol=1e-6)
    assert sum(whole.ledger.flops.values()) == pytest.approx(whole.counted_flops, rel=0.02)
    plain = one_step(run_config(changes))
    assert whole.ce < plain.ce
    assert whole.kd == pytest.approx(plain.kd, rel=1e-5) if ce == "none" else whole.kd > plain.kd


def test_borders_need_both_terms():
    with pytest.raises(ConfigError, match="needs both terms"):
        run_config({"supervision.borders": {}})
    with pytest.raises(ConfigError, match="needs both terms"):
        run_config({"supervision.borders": {}, "teacher.model": "tiny-teacher", "loss.kd_ratio": 1.0})
    with pytest.raises(ConfigError, match="probability"):
        BorderConfig(probability=0.5)
