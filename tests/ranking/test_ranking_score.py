"""Scores: equal to transformers' own logits, alone or sharing a prefix; only answer positions reach the head."""

import numpy as np
import pytest
import torch
from made_models import FAMILIES, made_model

from limbeck.models import anatomy
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.models.parts import Head
from limbeck.ranking import score
from limbeck.ranking.featurize import EncodedRequest, Labels
from limbeck.ranking.score import score_request

LABELS = Labels(yes=17, no=40)


def request(prefix=11, candidates=(3, 7, 1, 5), seed=0):
    rng = np.random.default_rng(seed)
    return EncodedRequest(
        "r",
        rng.integers(3, 96, prefix).astype(np.int32),
        tuple(rng.integers(3, 96, n).astype(np.int32) for n in candidates),
        np.zeros(len(candidates), bool),
    )


def plain(lm, pair):
    with torch.no_grad():
        return lm(torch.from_numpy(pair.astype(np.int64))[None]).logits[0, -1]


SUPPORTED = [family for family in FAMILIES if family != "gemma2"]  # which caps its logits


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("layout", ["sdpa", PACKED_ATTENTION])
def test_scores_are_those_of_a_plain_forward(family, layout):
    lm, made = made_model(family), request(prefix=8)  # inside the sliding windows
    lm.set_attn_implementation(layout)
    found = score_request(lm, made, LABELS)
    lm.set_attn_implementation("sdpa")
    for index in range(4):
        probabilities = plain(lm, made.pair(index)).double().softmax(-1)
        yes, no = float(probabilities[LABELS.yes]), float(probabilities[LABELS.no])
        assert float(found.probability[index]) == pytest.approx(yes / (yes + no), abs=2e-6)
        assert float(found.log_odds[index]) == pytest.approx(np.log(yes / no), abs=2e-5)
        assert float(found.label_mass[index]) == pytest.approx(yes + no, rel=2e-5)


def test_padding_rows_of_the_head_have_no_mass():
    lm, made = made_model("llama-tied"), request()
    found = score_request(lm, made, LABELS, vocab_size=50)
    probabilities = plain(lm, made.pair(2))[:50].softmax(-1)
    assert float(found.label_mass[2]) == pytest.approx(float(probabilities[[17, 40]].sum()), rel=1e-5)


def test_only_answer_positions_reach_the_head(monkeypatch):
    lm, made = made_model("llama"), request()
    lm.set_attn_implementation(PACKED_ATTENTION)
    seen = []
    whole = Head.logits
    monkeypatch.setattr(Head, "logits", lambda head, h: seen.append((len(h), len(head.weight))) or whole(head, h))
    score_request(lm, made, LABELS)
    assert seen == [(4, 2), (4, 96)]


def test_the_prefix_is_computed_once(monkeypatch):
    lm, made = made_model("llama"), request(prefix=30)
    lm.set_attn_implementation(PACKED_ATTENTION)
    computed = []
    whole = anatomy.hidden_rows

    def counted(*arguments):
        hidden, what = whole(*arguments)
        computed.append(what.tokens)
        return hidden, what

    monkeypatch.setattr(score, "hidden_rows", counted)
    score_request(lm, made, LABELS)
    assert computed == [30 + 3 + 7 + 1 + 5]


def test_very_sure_models_keep_their_order():
    lm, made = made_model("llama"), request()
    with torch.no_grad():
        lm.lm_head.weight.mul_(500)
    found = score_request(lm, made, LABELS)
    assert torch.isfinite(found.log_odds).all() and len(found.log_odds.unique()) == 4
    assert found.log_odds.abs().max() > 100
