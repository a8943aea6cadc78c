"""Quantised directories: what is written comes back, inputs are rounded, traps are refused."""

import json

import pytest
import torch
from made_models import made_model
from written_models import linears_of, rounded_to, schemes_for, write_quantized

from limbeck.errors import CompressionError, ConfigError, ModelError
from limbeck.models.anatomy import backbone_of, hidden_rows
from limbeck.models.kv_quant import (
    Int8,
    cache_scales,
    int8_cache,
    int8_rounding,
    rounded_cache,
)
from limbeck.models.lean import can_run
from limbeck.models.load import load_model
from limbeck.models.quantized import RoundedLinear, quantization_of, rounded_inputs
from limbeck.models.schemes import SCHEMES, Scheme, config_of, scheme_of, stored_weight, tensors_of, weight_of

IDS = torch.tensor([[5, 17, 80, 3, 42, 9, 61]])


def changed_config(directory, change):
    file = directory / "config.json"
    tree = json.loads(file.read_text())
    change(tree["quantization_config"])
    file.write_text(json.dumps(tree))


WIDTHS = [
    *(scheme_of(f"w{bits}a16", 16) for bits in range(2, 9)),
    scheme_of("w4a16", None),
    SCHEMES["w8a8"],
    SCHEMES["fp8-dynamic"],
    SCHEMES["fp8-static"],
]


@pytest.mark.parametrize("scheme", WIDTHS, ids=lambda s: f"{s.kind}{s.bits}-{s.strategy}-{s.activations}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_tensors_stand_for_the_rounded_weight(scheme, dtype):
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    quantized = rounded_to(weight, scheme, dtype)
    scale = 0.1 if scheme.activations == "static" else None
    tensors = tensors_of("", quantized.codes, quantized.scales, scheme, dtype, scale)
    assert tensors["weight_scale"].dtype == dtype
    assert torch.equal(weight_of(stored_weight(tensors, scheme, "layer"), torch.float32), quantized.dequantize())
    config = {"quantization_config": config_of(scheme)}
    assert quantization_of(config, "config").scheme("model.layers.0.mlp.up_proj") == scheme
    assert quantization_of(config, "config").scheme("lm_head") is None


@pytest.mark.parametrize("name", ["w4a16", "w8a8", "fp8-dynamic", "fp8-static"])
def test_a_directory_loads_as_the_dense_model_with_rounded_inputs(name, tmp_path):
    model = made_model("llama-biased")
    scheme = scheme_of(name, 16)
    dense = write_quantized(tmp_path, model, schemes_for(model, scheme))
    loaded = load_model(str(tmp_path))
    assert not hasattr(loaded.config, "quantization_config")
    for key, weight in dense.items():
        assert torch.equal(loaded.state_dict()[key], weight)
    model.load_state_dict(dense, strict=False)
    expected = []
    for layer in linears_of(model):
        module = model.get_submodule(layer)
        if scheme.activations:
            fixed = torch.tensor([0.02]) if scheme.activations == "static" else None
            module.register_forward_pre_hook(lambda _, args, s=fixed: (rounded_inputs(args[0], scheme.kind, s),))
            expected.append(layer)
    assert [n for n, m in loaded.named_modules() if isinstance(m, RoundedLinear)] == expected
    with torch.inference_mode():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)


def test_mixed_precision_and_layers_left_dense(tmp_path):
    model = made_model("qwen3")
    names = linears_of(model)
    kinds = [scheme_of("w4a16", 16), scheme_of("w8a16", 16), SCHEMES["w8a8"], None]
    schemes = {name: kind for i, name in enumerate(names) if (kind := kinds[i % 4]) is not None}
    dense = write_quantized(tmp_path, model, schemes)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"pack-quantized", "int-quantized"}
    loaded = load_model(str(tmp_path)).state_dict()
    for key, weight in (model.state_dict() | dense).items():
        assert torch.equal(loaded[key], weight[: len(loaded[key])]), key


def test_tied_head_and_bfloat16(tmp_path):
    model = made_model("llama-tied")
    dense = write_quantized(tmp_path, model, schemes_for(model, scheme_of("w4a16", 16)), torch.bfloat16)
    loaded = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(loaded.state_dict()[key], dense[key])


def test_fast_paths_leave_rounded_layers_and_watched_models_alone(tmp_path):
    model = made_model("llama")
    assert can_run(backbone_of(model))
    with rounded_cache(model):
        assert not can_run(backbone_of(model))
    assert can_run(backbone_of(model))
    write_quantized(tmp_path / "a", model, schemes_for(model, SCHEMES["w8a8"]))
    write_quantized(tmp_path / "b", model, schemes_for(model, scheme_of("w4a16", 16)))
    assert can_run(backbone_of(load_model(str(tmp_path / "b"))))
    packed = load_model(str(tmp_path / "a"), layout="packed")
    assert not can_run(backbone_of(packed))
    two = torch.cat([IDS, IDS.flip(1)], 1)
    positions = torch.arange(7).repeat(2)[None]
    with torch.inference_mode():
        rows, _ = hidden_rows(packed, two, positions, torch.arange(14), [7, 7])
        alone = backbone_of(load_model(str(tmp_path / "a")))(IDS.flip(1)).last_hidden_state[0]
    torch.testing.assert_close(rows[7:], alone, rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_the_rounding(tmp_path):
    model = made_model("llama")
    write_quantized(tmp_path, model, schemes_for(model, SCHEMES["w8a8"]))
    loaded = load_model(str(tmp_path))
    loaded(IDS).logits.square().mean().backward()
    gradient = loaded.model.embed_tokens.weight.grad[IDS[0]]
    assert gradient.abs().amax(-1).min() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("quantization_status"), "computes with wrong weights"),
        (lambda q: q.update(quantization_status="frozen"), "quantization_status is 'frozen'"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False), "asymmetric weights"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group"), "actorder"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=1), "are not read"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(strategy="block"), "are not read"),
        (lambda q: q.update(sparsity_config={"format": "dense", "targets": ["Linear"]}), "sparsity_config is set"),
        (lambda q: q.update(format="marlin-24"), "format 'marlin-24' is unknown"),
        (lambda q: q.update(quant_method="gptq"), "quantised with 'gptq'"),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 4, "type": "int"}), "kv_cache_scheme"),
        (
            lambda q: q.update(
                kv_cache_scheme={
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "tensor",
                    "symmetric": True,
                    "dynamic": False,
                }
            ),
            "k_scale, which a kv_cache_scheme needs",
        ),
        (lambda q: q["ignore"].append("re:.*down_proj"), "no group of config.json is meant for it"),
        (lambda q: q["ignore"].remove("lm_head"), "lm_head is stored dense"),
    ],
)
def test_traps_are_refused(change, message, tmp_path):
    model = made_model("llama")
    write_quantized(tmp_path, model, schemes_for(model, scheme_of("w4a16", 16)))
    load_model(str(tmp_path))
    changed_config(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path))


def test_damaged_tensors_are_refused():
    scheme = scheme_of("w4a16", 16)
    quantized = rounded_to(torch.randn(8, 32), scheme)
    tensors = tensors_of("", quantized.codes, quantized.scales, scheme)
    with pytest.raises(ModelError, match="layer: no tensor weight_shape"):
        stored_weight({k: v for k, v in tensors.items() if k != "weight_shape"}, scheme, "layer")
    with pytest.raises(ModelError, match=r"scales \[8, 2\] for weight \[8, 32\]"):
        stored_weight(tensors, scheme_of("w4a16", 32), "layer")


def test_what_does_not_fit_a_scheme_is_refused():
    codes, scales = torch.zeros(4, 48, dtype=torch.int8), torch.ones(4, 3)
    with pytest.raises(CompressionError, match="choose a group_size that divides"):
        tensors_of("x", codes, scales, scheme_of("w4a16", 32))
    with pytest.raises(CompressionError, match="expected torch"):
        tensors_of("x", codes, scales, SCHEMES["fp8-dynamic"])
    with pytest.raises(CompressionError, match=r"\[0, 48\]"):
        tensors_of("x", codes[:0], scales[:0], scheme_of("w4a16", 16))
    with pytest.raises(CompressionError, match="scales do not fit into"):
        tensors_of("x", codes, scales * 1e6, scheme_of("w4a16", 16), torch.float16)
    fp8 = codes.to(torch.float8_e4m3fn)
    with pytest.raises(CompressionError, match="need an input_scale"):
        tensors_of("x", fp8, scales[:, :1], SCHEMES["fp8-static"])
    with pytest.raises(CompressionError, match="one scale for the whole layer"):
        tensors_of("x", fp8, torch.arange(4.0)[:, None], SCHEMES["fp8-static"], input_scale=1.0)
    with pytest.raises(ConfigError, match="did you mean 'fp8-static'"):
        scheme_of("fp8_static")


def test_rounded_inputs():
    inputs = (
        torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 30.0])[:, None, None]
    )
    for kind, bound in (("int", 0.5 / 127.5), ("float", 2.0**-4)):
        error = (rounded_inputs(inputs, kind, None) - inputs).abs()
        assert (error <= bound * inputs.abs().amax(-1, keepdim=True) * 1.001).all()
        # Each token by itself.
        assert torch.equal(rounded_inputs(inputs, kind, None)[1], rounded_inputs(inputs[1:], kind, None)[0])
    assert rounded_inputs(torch.zeros(1, 2, 4), "int", None).abs().max() == 0
    assert rounded_inputs(torch.zeros(1, 0, 4), "int", None).shape == (1, 0, 4)
    assert rounded_inputs(torch.tensor([[1000.0]]), "float", torch.tensor([1.0])).item() == 448


def test_int8_states_are_off_by_half_a_step_at_most():
    states = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(0)) * 5
    stored = Int8.of(states)
    assert ((stored.dequantize(torch.float32) - states).abs() <= stored.scales / 2 * 1.0001).all()
    assert Int8.of(torch.zeros(1, 1, 1, 8)).dequantize(torch.float32).abs().max() == 0


def test_the_int8_cache_gives_what_rounding_gives_and_drifts_little():
    model = made_model("llama", seed=3)
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        exact = model(ids).logits.log_softmax(-1)
        cache = int8_cache()
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(24)]
        with rounded_cache(model):
            whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-3, atol=2e-3)
    drift = (whole.log_softmax(-1) - exact).abs()
    # Measured 0.011 at most; keys and values of 4 bits give 0.18.
    assert 0 < drift.max() < 0.03
    stored = cache.layers[0].keys
    assert stored.dtype == torch.int8 and stored.shape == (2, 2, 24, 8 + 4)


def test_the_int8_cache_serves_generate():
    model = made_model("llama", seed=3)
    limits = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with_cache = model.generate(IDS, **limits, past_key_values=int8_cache())
    with rounded_cache(model):
        rounded = model.generate(IDS, **limits)
    assert with_cache.shape == (1, IDS.shape[1] + 12) and torch.equal(rounded, with_cache)


def test_fixed_scales_of_the_cache(tmp_path):
    model = made_model("llama")
    scales = cache_scales(model, [IDS, IDS[:, :3]])
    assert set(scales) == {f"model.layers.{i}.self_attn.{k}_scale" for i in range(3) for k in "kv"}
    with torch.inference_mode():
        cache = model(IDS, use_cache=True).past_key_values
    largest = cache.layers[1].values.abs().max() / 448
    torch.testing.assert_close(scales["model.layers.1.self_attn.v_scale"], largest.reshape(1))
    write_quantized(tmp_path, model, schemes_for(model, scheme_of("w8a16", 16)), kv_scales=scales)
    loaded = load_model(str(tmp_path))
    with torch.inference_mode():
        stored = loaded(IDS, use_cache=True).past_key_values.layers[1].values
        levels = stored / scales["model.layers.1.self_attn.v_scale"]
    torch.testing.assert_close(levels.to(torch.float8_e4m3fn).float(), levels, rtol=1e-5, atol=1e-5)
    assert not can_run(backbone_of(loaded))


def test_names_go_before_patterns_and_patterns_before_the_class():
    config = config_of({"a": scheme_of("w4a16"), "b": scheme_of("w8a16")}, ())
    config["config_groups"]["group_2"] = config_of(SCHEMES["w8a8"])["config_groups"]["group_0"]
    config["config_groups"]["group_1"]["targets"] = ["re:.*b$", "re:a"]
    found = quantization_of({"quantization_config": config}, "x")
    assert (found.scheme("a").bits, found.scheme("model.b").bits) == (4, 8)
    assert found.scheme("c") == SCHEMES["w8a8"]
    assert int8_rounding("x", "k", torch.ones(1, 1, 1, 4)).tolist() == [[[[1.0] * 4]]]
    assert isinstance(found.scheme("c"), Scheme)
