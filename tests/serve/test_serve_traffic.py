"""Random traffic with a small cache: scores stay those of a plain forward pass, int8 stays the same to the bit."""

import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_models import made_model

from limbeck.engine.decoder import Decoder
from limbeck.engine.plan import PATHS, Costs
from limbeck.engine.requests import Request
from limbeck.engine.scoring import Scorer, ScoringConfig
from limbeck.engine.weights import weights_of

COSTS = Costs((1, 64, 256), (1e-3, 2e-3, 6e-3), 1e-9)
TOKENS = st.integers(0, 95)
ITEMS = st.lists(st.lists(TOKENS, max_size=12), min_size=1, max_size=4)
# Prefixes are cuts of two texts, so that they share beginnings.
TEXTS = [[(7 * place + place // 5) % 96 for place in range(60)], [(7 * place + place // 9) % 96 for place in range(60)]]
PREFIXES = st.builds(lambda text, cut: TEXTS[text][:cut], st.integers(0, 1), st.integers(1, 60))
BATCHES = st.lists(
    st.lists(st.builds(lambda p, i: Request(p, i, [3, 5, 90]), PREFIXES, ITEMS), min_size=1, max_size=2),
    min_size=1,
    max_size=3,
)


@functools.cache
def decoder_of(family, precision):
    return Decoder(weights_of(made_model(family), precision))


@functools.cache
def twin(family):
    return made_model(family)


def traffic(family, precision, path, blocks, batches, check):
    decoder = decoder_of(family, precision)
    budget = 70 * decoder.bytes_per_token
    config = ScoringConfig(path=path, block_tokens=blocks, pass_tokens=40)
    scorer = Scorer(decoder, config, costs=COSTS, budget=budget)
    for requests in batches:
        with torch.inference_mode():
            for request, scores in zip(requests, scorer.score(requests), strict=True):
                check(request, scores)
        stats = scorer.cache_stats()
        assert stats.used_bytes <= budget
        assert all(block.users == 0 for block in scorer.cache._blocks.values())


@settings(max_examples=10)
@given(st.sampled_from(["llama", "qwen3", "mistral", "gemma"]), st.sampled_from([*PATHS, "auto"]), BATCHES)
def test_float32_equals_transformers(family, path, batches):
    def check(request, scores):
        rows = [twin(family)(torch.tensor([[*request.prefix, *item]])).logits[0, -1] for item in request.items]
        expected = torch.stack(rows)[:, list(request.labels)].log_softmax(1)
        torch.testing.assert_close(scores.label_log_probs, expected, rtol=0, atol=1e-5)

    traffic(family, "float32", path, 16, batches, check)


@settings(max_examples=10)
@given(st.sampled_from(["llama", "gemma3"]), st.sampled_from([*PATHS, "auto"]), st.sampled_from([4, 16]), BATCHES)
def test_int8_equals_the_single_score(family, path, blocks, batches):
    config = ScoringConfig(path="single", block_tokens=blocks)
    alone = Scorer(decoder_of(family, "int8"), config, costs=COSTS, budget=0)

    def check(request, scores):
        for item, row in zip(request.items, scores.logits, strict=True):
            assert torch.equal(alone.score([request._replace(items=[item])])[0].logits[0], row)

    traffic(family, "int8", path, blocks, batches, check)
