"""A shrunk model is the masked one, loads as plain transformers, and takes its sizes from indices."""

import pytest
import torch
import transformers
from made_models import FAMILIES, made_model

from limbeck.compress.shrink import (
    BlockKept,
    BlockSizes,
    kv_group_choices,
    renumbered,
    round_size,
    shrink_block,
    shrink_model,
    shrunk_config,
)
from limbeck.errors import CompressionError

IDS = torch.arange(40).view(2, 20) % 90 + 3


def kept_of(model, groups=1, neurons=32, seed=0):
    """Other neurons and KV groups in every layer; every expert has its own."""
    draw = torch.Generator().manual_seed(seed)
    config = model.config
    experts = getattr(config, "num_local_experts", None)

    def some(whole, count):
        return torch.randperm(whole, generator=draw)[:count].sort().values

    return {
        layer: BlockKept(
            torch.stack([some(config.intermediate_size, neurons) for _ in range(experts)])
            if experts
            else some(config.intermediate_size, neurons),
            some(config.num_key_value_heads, groups),
        )
        for layer in range(config.num_hidden_layers)
    }


@torch.no_grad()
def mask(model, kept):
    """Zeros in the columns of o_proj and down_proj that go."""
    sizes = BlockSizes.of(model.config)
    for layer, block in kept.items():
        module = model.model.layers[layer]
        out = module.self_attn.o_proj.weight.unflatten(1, (-1, sizes.head_dim * sizes.query_heads))
        out[:, [group for group in range(out.shape[1]) if group not in block.kv_groups]] = 0
        experts = getattr(module.mlp, "experts", None)
        downs = experts.down_proj if experts is not None else [module.mlp.down_proj.weight]
        for down, neurons in zip(downs, block.neurons.view(-1, block.neurons.shape[-1]), strict=True):
            gone = torch.ones(down.shape[1], dtype=torch.bool)
            gone[neurons] = False
            down[:, gone] = 0


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("groups", [1, 2])
def test_shrunk_is_masked_and_loads_plainly(family, groups, tmp_path):
    model = made_model(family)
    kept = kept_of(model, groups)
    smaller = shrink_model(model, kept)
    smaller.save_pretrained(tmp_path)
    mask(model, kept)
    want = model(IDS).logits
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(smaller(IDS).logits, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert loaded.config.intermediate_size == 32
    assert loaded.config.num_attention_heads == 2 * groups
    assert loaded.num_parameters() < model.num_parameters()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma2", "gemma3", "mixtral"])
def test_whole_layers_go(family, tmp_path):
    model = made_model(family)
    shrink_model(model, {}, [0, 2]).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    skipped = model.model.layers[1]
    skipped.forward = lambda hidden_states, **_: hidden_states
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    if family == "gemma3":
        assert loaded.config.layer_types == ["sliding_attention", "full_attention"]


def test_a_kept_neuron_of_zeros_stays():
    tensors = {"mlp.down_proj.weight": torch.zeros(4, 6), "mlp.up_proj.weight": torch.zeros(6, 4)}
    shrunk = shrink_block(tensors, BlockKept(neurons=torch.tensor([1, 2, 5])), BlockSizes(4, 1))
    assert shrunk["mlp.down_proj.weight"].shape == (4, 3)
    assert shrunk["mlp.up_proj.weight"].shape == (3, 4)


def test_nothing_to_do_changes_nothing():
    model = made_model("qwen3")
    block = model.model.layers[0].state_dict()
    shrunk = shrink_block(block, BlockKept(), BlockSizes.of(model.config))
    assert all(shrunk[name] is tensor for name, tensor in block.items())


def test_unknown_tensors_are_refused():
    with pytest.raises(CompressionError, match=r"self_attn\.qkv_proj\.weight: no rule"):
        shrink_block(
            {"self_attn.qkv_proj.weight": torch.zeros(6, 2)}, BlockKept(kv_groups=torch.tensor([0])), BlockSizes(2, 1)
        )
    with pytest.raises(CompressionError, match="no o_proj"):
        shrink_block(
            {"mlp.up_proj.weight": torch.zeros(6, 2)}, BlockKept(kv_groups=torch.tensor([0])), BlockSizes(2, 1)
        )


def test_layers_of_different_sizes_are_refused():
    model = made_model("llama")
    with pytest.raises(CompressionError, match="neurons: layers keep different numbers"):
        shrink_model(model, {0: BlockKept(neurons=torch.arange(8))})


def test_numbers_of_heads_that_transformers_refuses_are_named():
    config = transformers.LlamaConfig(
        hidden_size=96, num_attention_heads=16, num_key_value_heads=8, intermediate_size=32, num_hidden_layers=1
    )
    assert kv_group_choices(config) == [1, 2, 3, 4, 6, 8]
    with pytest.raises(CompressionError, match="keep 1, 2, 3, 4, 6, 8 of 8"):
        shrunk_config(config, kv_groups=5)
    assert shrunk_config(config, kv_groups=6).head_dim == 6
    assert config.num_attention_heads == 16


def test_sizes_and_names():
    assert round_size(100, 32, 1536) == 96
    assert round_size(3, 32, 1536) == 32
    assert round_size(1530, 32, 1500) == 1500
    assert renumbered("model.layers.3.mlp.up_proj.weight", [0, 3]) == "model.layers.1.mlp.up_proj.weight"
    assert renumbered("model.layers.2.mlp.up_proj.weight", [0, 3]) is None
    assert renumbered("model.norm.weight", [0]) == "model.norm.weight"
