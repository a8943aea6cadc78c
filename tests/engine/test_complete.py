"""Many prompts at once: the tokens of transformers' own decoding, for every back end, in any batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from made_models import made_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from limbeck.engine.backends import decoder_of, unsupported
from limbeck.engine.complete import complete
from limbeck.engine.decoder import Decoder
from limbeck.engine.plain import PlainDecoder
from limbeck.engine.requests import Request
from limbeck.engine.sampling import SamplingConfig
from limbeck.engine.scoring import Scorer, ScoringConfig
from limbeck.errors import ConfigError, ModelError
from limbeck.models.attention import PACKED_ATTENTION

VOCABULARY = 40
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def made(name: str) -> nn.Module:
    torch.manual_seed(2)
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    mamba = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.3, **ENDS}
    layers = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    models = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "mistral with a sliding window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16)),
        "llama, eager attention": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager")),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2, **common)),
        "a mixture": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)),
        "a hybrid": lambda: Lfm2ForCausalLM(Lfm2Config(**{**SHAPE, **layers}, block_auto_adjust_ff_dim=False)),
        "a state-space model": lambda: MambaForCausalLM(MambaConfig(**mamba, **common)),
    }
    return models[name]().eval()


LEAN = ("llama", "mistral with a sliding window", "llama, eager attention")
OTHERS = ("gpt2", "a mixture", "a hybrid", "a state-space model")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return made("llama")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 17, 1, 9, 9, 30, 5, 12, 2, 8, 21]
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def reference_greedy(model: nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    """Each token from a whole forward pass of the text so far."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def tokens_of(found: list) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in samples] for samples in found]


@pytest.mark.parametrize("name", [*LEAN, *OTHERS])
def test_greedy_texts_are_those_of_whole_forward_passes(name: str, prompts: list[list[int]]) -> None:
    model = made(name)
    assert (unsupported(model) is None) == (name in LEAN)
    expected = [reference_greedy(model, prompt, 14) for prompt in prompts]
    stop_ids = [expected[0][3], expected[4][10]]
    ours = complete(model, prompts, SamplingConfig(max_new_tokens=14, batch_size=4), stop_ids)
    for tokens, (completion,) in zip(expected, ours, strict=True):
        text = list(itertools.takewhile(lambda token: token not in stop_ids, tokens))
        assert completion.token_ids == tokens[: len(text) + 1]
        assert completion.stopped == (len(text) < 14)
        assert completion.text_ids == text
    assert {completion.stopped for (completion,) in ours} == {True, False}, "both ways to end must occur"


@pytest.mark.parametrize("name", ["llama", "a hybrid"])
def test_completions_do_not_depend_on_the_batch(name: str, prompts: list[list[int]]) -> None:
    model = made(name)

    def sample(chosen: list[list[int]], batch_size: int, max_new_tokens: int = 12) -> list[list[list[int]]]:
        config = SamplingConfig(
            max_new_tokens=max_new_tokens, temperature=1.0, top_p=0.9, num_samples=3, batch_size=batch_size
        )
        return tokens_of(complete(model, chosen, config, [5], 7))

    one_by_one = sample(prompts, 1)
    assert sample(prompts, 5) == sample(prompts, 64) == one_by_one
    assert sample(prompts[:4], 64) == one_by_one[:4]
    assert [[c[:6] for c in samples] for samples in one_by_one] == sample(prompts, 16, max_new_tokens=6)
    assert all(a != b for samples in one_by_one for a, b in itertools.combinations(samples, 2) if len(a) > 4)


@pytest.mark.parametrize("way", ["keys", "cache", "whole"])
def test_every_way_of_transformers_writes_and_scores_what_the_lean_decoder_does(
    way: str, llama: nn.Module, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SamplingConfig(max_new_tokens=10, temperature=0.9, num_samples=2, batch_size=8)
    lean = complete(llama, prompts, config, [5], 3, log_probs=True)
    request = Request(prompts[5], [prompts[0], prompts[3], [7]], [3, 9], True)
    scored = Scorer(decoder_of(llama)).score([request])[0]
    monkeypatch.setattr("limbeck.engine.plain._ways", {llama: way})
    monkeypatch.setattr("limbeck.engine.backends.unsupported", lambda _: "not asked")
    plain = complete(llama, prompts, config, [5], 3, log_probs=True)
    decoder = decoder_of(llama)
    assert isinstance(decoder, PlainDecoder) and decoder.way == way and decoder.has_blocks == (way == "keys")
    assert tokens_of(plain) == tokens_of(lean)
    for one, other in zip(itertools.chain(*plain), itertools.chain(*lean), strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=2e-5)
    for path in ("single", "cached", "shared", "packed"):
        again = Scorer(decoder, ScoringConfig(path=path, block_tokens=8)).score([request])[0]
        torch.testing.assert_close(again.log_probs, scored.log_probs, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "way"), [("gpt2", "keys"), ("a mixture", "keys"), ("a state-space model", "cache")])
def test_a_model_is_asked_how_much_can_be_kept_of_it(name: str, way: str) -> None:
    assert PlainDecoder(made(name)).way == way


def test_the_choice_is_told(prompts: list[list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    from limbeck.engine import backends

    backends._tell.cache_clear()
    for _ in range(2):
        complete(made("gpt2"), prompts[:1], SamplingConfig(max_new_tokens=2), [])
    told = capsys.readouterr().err
    assert told.count("slower") == 1 and "GPT2LMHeadModel" in told
    with pytest.raises(ModelError, match="precision int8: GPT2LMHeadModel"):
        complete(made("gpt2"), prompts[:1], SamplingConfig(precision="int8"), [])


def test_seed_and_keys_change_the_draws(llama: nn.Module, prompts: list[list[int]]) -> None:
    config = SamplingConfig(max_new_tokens=12, temperature=1.0)
    outputs = [tokens_of(complete(llama, prompts[:3], config, [], seed)) for seed in (0, 0, 1)]
    assert outputs[0] == outputs[1] != outputs[2]
    assert tokens_of(complete(llama, prompts[1:3], config, [], keys=[1, 2])) == outputs[0][1:]


def test_a_prompt_is_read_once_for_its_samples(
    llama: nn.Module, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    run = Decoder.run

    def counted(self: Decoder, segments: list, every_row: bool = False) -> torch.Tensor:
        read.extend(len(segment.tokens) for segment in segments if segment.start == 0)
        return run(self, segments, every_row)

    monkeypatch.setattr(Decoder, "run", counted)
    config = SamplingConfig(max_new_tokens=4, temperature=1.0, num_samples=8, batch_size=16)
    complete(llama, [prompts[1], prompts[3]], config, [])
    assert sorted(read) == [9, 17]


def test_the_weights_are_read_where_they_are(prompts: list[list[int]]) -> None:
    """An update is seen, and nothing is copied."""
    model = made("llama")
    decoder = decoder_of(model)
    assert isinstance(decoder, Decoder)
    assert decoder.weights.blocks[1].down.weight.data_ptr() == model.model.layers[1].mlp.down_proj.weight.data_ptr()
    assert decoder.weights.blocks[0].qkv.parts[2].weight.data_ptr() == (
        model.model.layers[0].self_attn.v_proj.weight.data_ptr()
    )
    before = tokens_of(complete(model, prompts, SamplingConfig(max_new_tokens=8), []))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    assert tokens_of(complete(model, prompts, SamplingConfig(max_new_tokens=8), [])) != before


def test_progress_counts_every_completion(llama: nn.Module, prompts: list[list[int]]) -> None:
    ended: list[int] = []
    config = SamplingConfig(max_new_tokens=9, temperature=1.0, num_samples=2, batch_size=3)
    complete(llama, prompts, config, [5], advance=ended.append)
    assert sum(ended) == 2 * len(prompts)
    assert min(ended) > 0


def test_the_context_limits_a_completion(llama: nn.Module) -> None:
    ((completion,),) = complete(llama, [[3] * 120], SamplingConfig(max_new_tokens=50), [])
    assert len(completion.token_ids) == 8
    assert not completion.stopped
    with pytest.raises(ConfigError, match="prompt 1 has 128 tokens"):
        complete(llama, [[3], [3] * 128], SamplingConfig(), [])
    with pytest.raises(ConfigError, match="prompt 0 has 0 tokens"):
        complete(llama, [[]], SamplingConfig(), [])
    assert complete(llama, [], SamplingConfig(), []) == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_in_training_comes_back_as_it_was(name: str, prompts: list[list[int]]) -> None:
    model = made(name)
    expected = complete(model, prompts[:3], SamplingConfig(max_new_tokens=8), [])
    model.train()
    model.config._attn_implementation = PACKED_ATTENTION
    assert complete(model, prompts[:3], SamplingConfig(max_new_tokens=8), []) == expected
    assert model.training and model.config._attn_implementation == PACKED_ATTENTION


def test_half_precision_follows_transformers(prompts: list[list[int]]) -> None:
    """Weights that are no float32 take the operators of any device."""
    model = made_model("qwen3").to(torch.bfloat16)
    tokens = torch.tensor([[1, 5, 8, 13, 40, 41, 2, 77, 5, 60, 9, 3]])
    request = Request(tokens[0, :7].tolist(), [tokens[0, 7:].tolist(), [5]], [3, 9], True)
    found = Scorer(decoder_of(model), ScoringConfig(block_tokens=4)).score([request])[0]
    with torch.no_grad():
        expected = model(tokens).logits[0, -1].float().log_softmax(-1)[[3, 9]]
    torch.testing.assert_close(found.log_probs[0], expected, atol=0.1, rtol=0)
    assert all(
        len(row[0]) == 6 for row in tokens_of(complete(model, prompts[:4], SamplingConfig(max_new_tokens=6), []))
    )


def test_int8_is_near_and_has_its_own_log_probs(llama: nn.Module, prompts: list[list[int]]) -> None:
    texts = {
        precision: complete(llama, prompts, SamplingConfig(max_new_tokens=1, precision=precision), [], log_probs=True)
        for precision in ("float32", "int8")
    }
    pairs = [
        (one.log_probs[0], other.log_probs[0])
        for (one,), (other,) in zip(*texts.values(), strict=True)
        if one.token_ids == other.token_ids
    ]
    assert len(pairs) >= len(prompts) - 3
    assert 0 < max(abs(a - b) for a, b in pairs) < 0.3


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"num_samples": 0},
        {"batch_size": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"num_samples": 2},
        {"precision": "int4"},
    ],
)
def test_a_bad_config_is_refused(fields: dict) -> None:
    with pytest.raises(ConfigError):
        SamplingConfig(**fields)


def test_log_probs_are_at_the_temperature_that_draws(llama: nn.Module, prompts: list[list[int]]) -> None:
    config = SamplingConfig(max_new_tokens=6, temperature=0.6, batch_size=8)
    for prompt, (written,) in zip(prompts, complete(llama, prompts, config, [], 5, log_probs=True), strict=True):
        ids = torch.tensor([prompt + written.token_ids])
        with torch.no_grad():
            rows = llama(ids).logits[0, len(prompt) - 1 : -1]
        expected = (rows / 0.6).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert written.log_probs == pytest.approx(expected.tolist(), abs=2e-5)
