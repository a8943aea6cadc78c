"""Scores of a ranker by the engine: those of transformers' own logits, for models it reads and for others."""

import numpy as np
import pytest
import torch
from made_models import FAMILIES, made_model

from limbeck.engine.backends import decoder_of
from limbeck.engine.decoder import Decoder
from limbeck.ranking.evaluate import score_all
from limbeck.ranking.featurize import EncodedRequest, Labels

LABELS = Labels(yes=17, no=40)


def request(prefix=11, candidates=(3, 7, 1, 5), seed=0):
    rng = np.random.default_rng(seed)
    return EncodedRequest(
        "r",
        rng.integers(3, 96, prefix).astype(np.int32),
        tuple(rng.integers(3, 96, n).astype(np.int32) for n in candidates),
        np.arange(len(candidates)) % 2 == 0,
    )


def plain(lm, pair):
    with torch.no_grad():
        return lm(torch.from_numpy(pair.astype(np.int64))[None]).logits[0, -1]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_scores_are_those_of_a_plain_forward(family):
    """Windows, caps and mixtures included; several requests with candidates of several lengths."""
    lm, requests = made_model(family), [request(prefix=20), request((2), (4, 4), 1)]
    found = score_all(decoder_of(lm), requests, LABELS)
    assert found.owner.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.labels.tolist() == [True, False, True, False, True, False]
    pairs = [made.pair(index) for made in requests for index in range(len(made.candidates))]
    for index, pair in enumerate(pairs):
        probabilities = plain(lm, pair).double().softmax(-1)
        yes, no = float(probabilities[LABELS.yes]), float(probabilities[LABELS.no])
        assert found.probability[index] == pytest.approx(yes / (yes + no), abs=2e-6)
        assert found.log_odds[index] == pytest.approx(np.log(yes / no), abs=2e-5)
        assert found.label_mass[index] == pytest.approx(yes + no, rel=2e-5)


def test_the_prefix_is_computed_once(monkeypatch):
    computed, run = [], Decoder.run

    def counted(self, segments, every_row=False):
        computed.append(sum(len(segment.tokens) for segment in segments))
        return run(self, segments, every_row)

    decoder = decoder_of(made_model("llama"))
    monkeypatch.setattr(Decoder, "run", counted)
    score_all(decoder, [request(prefix=30)], LABELS)
    assert computed == [30 + 3 + 7 + 1 + 5]


def test_very_sure_models_keep_their_order():
    lm = made_model("llama")
    with torch.no_grad():
        lm.lm_head.weight.mul_(500)
    found = score_all(decoder_of(lm), [request()], LABELS)
    assert np.isfinite(found.log_odds).all() and len(np.unique(found.log_odds)) == 4
    assert np.abs(found.log_odds).max() > 100
