"""Scores by every way against transformers one by one, in float32; int8 to the last bit, whatever else is going on."""

import random

import pytest
import torch
from made_models import made_model
from made_tokenizers import byte_tokenizer

from limbeck.engine.decoder import Decoder
from limbeck.engine.plan import PATHS, Costs
from limbeck.engine.requests import Request, label_ids, text_request
from limbeck.engine.scoring import Scorer, ScoringConfig
from limbeck.engine.weights import weights_of
from limbeck.errors import ConfigError, ModelError

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3"]
COSTS = Costs((1, 64, 256), (1e-3, 2e-3, 6e-3), 1e-9)
LABELS = [4, 7, 95]


def ids(count, seed):
    generator = random.Random(seed)
    return [generator.randrange(96) for _ in range(count)]


PREFIX = ids(37, 0)
ITEMS = [ids(length, 10 + length + number) for number, length in enumerate([3, 5, 0, 3, 9, 1, 3, 30])]
ITEMS[0] = [4, 7, 4]  # label tokens inside
REQUEST = Request(PREFIX, ITEMS, LABELS, full=True)


def scorer_of(model, precision="float32", budget=1 << 24, **config):
    config = {"block_tokens": 8} | config
    return Scorer(Decoder(weights_of(model, precision)), ScoringConfig(**config), costs=COSTS, budget=budget)


def one_by_one(model, request):
    """Log-probs over the vocabulary by transformers, a forward pass an item."""
    with torch.inference_mode():
        rows = [model(torch.tensor([[*request.prefix, *item]])).logits[0, -1] for item in request.items]
    return torch.stack(rows).log_softmax(-1)[:, list(request.labels)]


@pytest.mark.parametrize("path", [*PATHS, "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_equals_transformers(family, path):
    model = made_model(family)
    expected = one_by_one(model, REQUEST)
    scorer = scorer_of(model, path=path)
    for _ in ("cold", "warm"):
        (scores,) = scorer.score([REQUEST])
        torch.testing.assert_close(scores.log_probs, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(scores.label_mass, expected.exp().sum(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(scores.label_log_probs, expected.log_softmax(1), rtol=0, atol=1e-5)
    assert scorer.usage.cached_tokens == (0 if path == "single" else len(PREFIX))


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3"])
def test_int8_is_the_same_to_the_bit(family, threads):
    """One item alone without a cache; any way, cold and warm, in any order, beside others, in passes of any size."""
    decoder = Decoder(weights_of(made_model(family), "int8"))
    alone = Scorer(decoder, ScoringConfig(path="single", block_tokens=8), costs=COSTS, budget=0)
    expected = torch.cat([alone.score([REQUEST._replace(items=[item])])[0].logits for item in ITEMS])
    order = random.Random(1).sample(range(len(ITEMS)), len(ITEMS))
    shuffled = REQUEST._replace(items=[ITEMS[place] for place in order])
    others = [
        Request(PREFIX[:20], [ids(3, 50), ids(7, 51)], [1]),
        Request([], [ids(4, 52), ids(3, 53)], LABELS),
        Request([*PREFIX[:16], *ids(20, 54)], [[], ids(9, 55)], LABELS),
    ]
    for path, pass_tokens in [("single", None), ("cached", 13), ("shared", None), ("packed", None), ("packed", 13)]:
        config = ScoringConfig(path=path, pass_tokens=pass_tokens, block_tokens=8)
        scorer = Scorer(decoder, config, costs=COSTS)
        scorer.score([others[0]])
        assert torch.equal(scorer.score([*others, REQUEST])[-1].logits, expected)
        assert torch.equal(scorer.score([shuffled, others[1]])[0].logits, expected[order])


def test_int8_keeps_its_bits_with_one_key_head(threads):
    """The case in which torch's kernel has a single product to do and could share it out among threads."""
    scorer = scorer_of(made_model("llama", num_key_value_heads=1), "int8")
    (batch,) = scorer.score([REQUEST])
    single = [scorer.score([REQUEST._replace(items=[item])])[0].logits for item in ITEMS]
    assert torch.equal(torch.cat(single), batch.logits)


def test_early_prefill_is_used_and_stays():
    model = made_model("llama")
    scorer = scorer_of(model, budget=40 * Decoder(weights_of(model)).bytes_per_token + 5 * 32 * 4)
    with scorer.prefill(PREFIX) as pin:
        assert pin.tokens == len(PREFIX)
        for seed in range(5):  # more than the cache has room for
            scorer.score([Request(ids(30, seed), [[1, 2]], LABELS)])
        (scores,) = scorer.score([REQUEST])
        assert scorer.usage.cached_tokens == len(PREFIX)
        assert scorer.usage.computed_tokens == sum(map(len, ITEMS))
        torch.testing.assert_close(scores.log_probs, one_by_one(model, REQUEST), rtol=0, atol=1e-5)
        with pytest.raises(ConfigError, match="Release pins or raise the budget"):
            scorer.prefill(ids(30, 99))
    pin.release()
    for seed in range(5):
        scorer.score([Request(ids(30, seed), [[1, 2]], LABELS)])
    scorer.score([REQUEST])
    assert scorer.usage.cached_tokens == 0


def test_empty_things():
    scorer = scorer_of(made_model("llama"))
    assert scorer.score([]) == []
    (nothing,) = scorer.score([Request(PREFIX, [], LABELS, full=True)])
    assert nothing.label_log_probs.shape == (0, 3) and nothing.label_mass.shape == (0,)
    with pytest.raises(ModelError, match="an empty item behind an empty prefix"):
        scorer.score([Request([], [[1], []], LABELS)])
    first, again = (scorer.score([Request(PREFIX, [[]], LABELS)])[0].logits for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(ConfigError, match="was not `full`"):
        scorer.score([Request(PREFIX, [[1]], LABELS)])[0].label_mass  # noqa: B018


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1], [[2]], []), "labels \\[\\]"),
        (Request([1], [[2]], [96]), "each in 0..95"),
        (Request([1, 96], [[2]], [1]), "token ids 1 to 96; the model has 0 to 95"),
        (Request([1], [[2], [-1]], [1]), "token ids -1 to -1"),
        (Request([1] * 100, [[2] * 29], [1]), "a prompt of 129 tokens; the limit is 128"),
    ],
)
def test_a_bad_request_is_refused_before_anything_runs(request_, message):
    scorer = scorer_of(made_model("llama"))
    with pytest.raises(ModelError, match=message):
        scorer.score([REQUEST, request_])
    assert scorer.cache_stats().blocks == 0 and scorer.usage is None
    with pytest.raises(ConfigError, match="path 'pack' is unknown; did you mean 'packed'"):
        scorer_of(made_model("llama"), path="pack").score([REQUEST])


def test_texts():
    """Unicode, empty items, and labels that are one token or none."""
    tokenizer = byte_tokenizer()
    model = made_model("llama", vocab_size=len(tokenizer))
    request = text_request(tokenizer, "Ärger 🙂 日本", ["", "naïve", "yes no", "\u0000\n", "🙂🙂"], ["y", "n"])
    scores = scorer_of(model).score([request._replace(full=True)])[0]
    torch.testing.assert_close(scores.log_probs, one_by_one(model, request), rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="label 'yes' is 3 tokens"):
        label_ids(tokenizer, ["yes"])
