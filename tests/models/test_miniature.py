"""Configs in small: every kind of layer stays, ratios stay, and what is not there is not invented."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig, MixtralConfig, Qwen2Config, Qwen3MoeConfig

from limbeck.models.miniature import MAX_LAYERS, VOCABULARY, small_config
from limbeck.models.parts import LogitForm, logit_forms


@given(
    layers=st.integers(1, 96),
    key_heads=st.sampled_from([1, 2, 4, 8]),
    group=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([32, 64, 128]),
)
@settings(max_examples=60)
def test_heads_keep_their_size_and_their_kind_of_sharing(layers, key_heads, group, head_dim):
    heads = 4 * key_heads * group if key_heads * group < 4 else key_heads * group
    whole = LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        hidden_size=heads * head_dim,
        intermediate_size=11_008,
        vocab_size=128_256,
    )
    before = copy.deepcopy(whole).to_dict()
    small = small_config(whole)
    assert whole.to_dict() == before
    assert small.head_dim == head_dim and small.hidden_size == small.num_attention_heads * head_dim
    assert small.num_hidden_layers == min(layers, 2) and small.vocab_size == VOCABULARY
    assert small.num_attention_heads % small.num_key_value_heads == 0
    shares_all, shares_some = key_heads == 1, 1 < key_heads < heads
    assert (small.num_key_value_heads == 1) == shares_all
    assert (1 < small.num_key_value_heads < small.num_attention_heads) == shares_some
    assert small.intermediate_size == 32


@given(every=st.integers(2, 7), layers=st.integers(2, 60))
@settings(max_examples=40)
def test_every_kind_of_layer_is_among_those_that_stay(every, layers):
    kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    small = small_config(Gemma3TextConfig(num_hidden_layers=layers, layer_types=kinds, sliding_window=4096))
    assert small.layer_types == kinds[: small.num_hidden_layers]
    assert set(small.layer_types) == set(kinds)
    assert small.sliding_window == 16 and small.num_hidden_layers <= max(2, every, MAX_LAYERS)


@pytest.mark.parametrize("narrow", [True, False])
def test_without_narrowing_heads_and_widths_stay(narrow):
    whole = Qwen2Config(hidden_size=896, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864)
    small = small_config(whole, narrow)
    assert (small.hidden_size == 896) == (small.intermediate_size == 4864) == (not narrow)
    assert small.hidden_size // small.num_attention_heads == 64


@pytest.mark.parametrize(
    ("config", "name", "per_token"),
    [
        (MixtralConfig(num_local_experts=64, num_experts_per_tok=2), "num_local_experts", 4),
        (Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8), "num_experts", 8),
        (MixtralConfig(num_local_experts=2, num_experts_per_tok=1), "num_local_experts", 2),
    ],
)
def test_as_many_experts_as_a_token_takes_stay(config, name, per_token):
    assert getattr(small_config(config), name) == per_token


def test_special_tokens_lie_in_the_small_vocabulary():
    small = small_config(LlamaConfig(bos_token_id=128_000, eos_token_id=[128_001, 128_009], pad_token_id=None))
    assert 0 <= small.bos_token_id < VOCABULARY and all(0 <= token < VOCABULARY for token in small.eos_token_id)
    assert small.pad_token_id is None


@given(scale=st.floats(0.1, 20), cap=st.one_of(st.none(), st.floats(1, 100)), flag=st.booleans())
@settings(max_examples=40)
def test_logits_may_mean_any_number_that_a_config_has_of_them(scale, cap, flag):
    config = LlamaConfig()
    config.logit_scale, config.final_logit_softcapping, config.scale_logits = scale, cap, flag
    forms = list(logit_forms(config))
    assert forms[0] == LogitForm() and forms[0].scale(config) == 1 and forms[0].softcap(config) is None
    assert len(forms) == len(set(forms)) == (1 + 2 * (scale != 1)) * (1 + (cap is not None))
    assert {form.scale(config) for form in forms} == {1.0, scale, 1 / scale}
    assert {form.softcap(config) for form in forms} == {None, cap}
