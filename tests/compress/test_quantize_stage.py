"""The stage `quantize`: the file is what the walk solved, and stock transformers reads the same numbers from it."""

import json

import pytest
import torch
import transformers
from test_prune_stage import IDS, QUIET, saved, text

from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.prune.stage import run as prune
from limbeck.compress.quantize.budget import MixedConfig
from limbeck.compress.quantize.stage import QuantizeConfig, run
from limbeck.compress.weights import SafetensorSource
from limbeck.errors import CompressionError, ConfigError
from limbeck.models.load import load_model
from limbeck.models.packing import unpack


def quantized(tmp_path, family="llama", **fields):
    saved(family, tmp_path / "model")
    groups = {"group_size": 16} if fields.get("scheme", "w4a16").endswith("a16") else {}
    fields = groups | {"calibration": text(tmp_path / "text"), "gate": QUIET} | fields
    return run(QuantizeConfig(model=str(tmp_path / "model"), **fields), tmp_path / "out").metrics


def error_of(tmp_path, family="llama"):
    with torch.no_grad():
        expected = load_model(str(tmp_path / "model"), whole=True)(IDS).logits
        found = load_model(str(tmp_path / "out"), whole=True)(IDS).logits
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-biased", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "fp8-dynamic"])
def test_transformers_reads_what_we_read(family, scheme, tmp_path):
    quantized(tmp_path, family, scheme=scheme, method="gptq")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(str(tmp_path / "out"), whole=True)(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4
        )
    assert error_of(tmp_path) < {"w4a16": 0.6, "w8a8": 0.1, "fp8-dynamic": 0.25}[scheme]


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16"])
def test_four_bit_floats_are_read_as_transformers_reads_them(scheme, tmp_path):
    saved("llama", tmp_path / "model", torch.bfloat16, hidden_size=64, intermediate_size=96)
    fields = {"model": str(tmp_path / "model"), "scheme": scheme, "calibration": text(tmp_path / "text"), "gate": QUIET}
    run(QuantizeConfig(**fields, method="gptq"), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        ours = load_model(str(tmp_path / "out"), torch.bfloat16, whole=True)(IDS).logits
        torch.testing.assert_close(ours, theirs(IDS).logits, rtol=2e-2, atol=2e-2)
    run(QuantizeConfig(**fields, method="rtn"), tmp_path / "rounded")
    dense = load_model(str(tmp_path / "model"), whole=True).state_dict()
    for name in ("gate_proj", "up_proj"):
        scales = [
            SafetensorSource(tmp_path / "out").tensor(f"model.layers.1.mlp.{layer}.weight_global_scale")
            for layer in ("gate_proj", "up_proj")
            if scheme == "nvfp4a16"
        ]
        assert len(set(map(float, scales))) <= 1, "engines fuse the two, with one global scale"
        weight = dense[f"model.layers.1.mlp.{name}.weight"]
        rounded = load_model(str(tmp_path / "rounded"), whole=True).state_dict()[f"model.layers.1.mlp.{name}.weight"]
        assert float((rounded - weight).norm() / weight.norm()) < 0.13


def test_four_bit_floats_are_refused_where_they_would_not_load(tmp_path):
    with pytest.raises(CompressionError, match=r"nvfp4-pack-quantized goes with bfloat16 alone.*float32"):
        quantized(tmp_path, scheme="nvfp4a16", group_size=128, method="rtn")
    with pytest.raises(ConfigError, match="group_size 32: mxfp4a16 shares its scales as it must"):
        QuantizeConfig(model="tiny-student", scheme="mxfp4a16", group_size=32)


@pytest.mark.parametrize("equalization", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_equalization_alone_changes_nothing(equalization, family, tmp_path):
    """At 8 bits and small groups rounding is almost exact, so what is left is that the folding cancels."""
    quantized(tmp_path, family, scheme="w8a16", equalization=equalization)
    assert error_of(tmp_path) < 0.04
    norm = "model.layers.1.input_layernorm.weight"
    before, after = (SafetensorSource(tmp_path / name).tensor(norm) for name in ("model", "out"))
    assert not torch.allclose(before, after)


def test_dense_targets_are_another_solution_of_like_error(tmp_path):
    """Which of both ends lower is chance on a random model; that a layer repairs damage is tested on the problem."""
    errors = []
    for number, dense_targets in enumerate((False, True)):
        (tmp_path / str(number)).mkdir()
        quantized(tmp_path / str(number), scheme="w3a16", method="gptq", dense_targets=dense_targets)
        errors.append(error_of(tmp_path / str(number)))
    assert errors[0] != errors[1] and max(errors) < 1.5 * min(errors)


def test_layers_of_one_input_round_as_apart(tmp_path):
    """Query, key and value are rounded as one matrix; alone, the key gets the same codes."""
    quantized(tmp_path, method="gptq")
    together = SafetensorSource(tmp_path / "out").tensor("model.layers.0.self_attn.k_proj.weight_packed")
    ignored = ("q_proj", "v_proj")
    config = QuantizeConfig(
        model=str(tmp_path / "model"),
        method="gptq",
        group_size=16,
        calibration=text(tmp_path / "text"),
        gate=QUIET,
        ignore=ignored,
    )
    run(config, tmp_path / "alone")
    alone = SafetensorSource(tmp_path / "alone")
    assert torch.equal(together, alone.tensor("model.layers.0.self_attn.k_proj.weight_packed"))
    assert alone.tensor("model.layers.0.self_attn.q_proj.weight").shape == (32, 32)
    tree = json.loads((tmp_path / "alone" / "config.json").read_text())["quantization_config"]
    assert "model.layers.2.self_attn.v_proj" in tree["ignore"]
    load_model(str(tmp_path / "alone"), whole=True)


def test_zeros_of_a_sparse_model_stay_codes_of_zero(tmp_path):
    saved("llama", tmp_path / "dense")
    calibration = text(tmp_path / "text")
    prune(
        PruneConfig(model=str(tmp_path / "dense"), method="wanda", pattern="2:4", calibration=calibration, gate=QUIET),
        tmp_path / "model",
    )
    config = QuantizeConfig(model=str(tmp_path / "model"), group_size=16, calibration=calibration, gate=QUIET)
    run(config, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    zeros = SafetensorSource(tmp_path / "model").tensor(name) == 0
    codes = unpack(SafetensorSource(tmp_path / "out").tensor(name + "_packed"), 4, 48)
    assert bool((codes[zeros] == 0).all())
    assert int(zeros.sum()) >= zeros.numel() // 2


def test_pattern_and_codes_together(tmp_path):
    quantized(tmp_path, pattern="2:4")
    codes = unpack(SafetensorSource(tmp_path / "out").tensor("model.layers.0.mlp.up_proj.weight_packed"), 4, 32)
    assert ((codes != 0).view(-1, 4).sum(1) <= 2).all()


def test_mixed_widths_keep_the_budget(tmp_path):
    quantized(tmp_path, method="rtn", mixed=MixedConfig(bits_per_weight=7.0))
    tree = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["num_bits"] for group in tree["config_groups"].values()} == {4, 8}
    source = SafetensorSource(tmp_path / "out")
    bits = weights = 0
    widths = {}
    for name in source.names():
        if name.endswith("weight_packed"):
            outputs, inputs = source.tensor(name.replace("packed", "shape")).tolist()
            weights += outputs * inputs
            bits += source.tensor(name).numel() * 32 + outputs * inputs // 16 * 16
            widths[name] = source.tensor(name).shape[1] * 32 // inputs
    assert bits / weights <= 7.0
    for number in range(3):
        prefix = f"model.layers.{number}.self_attn."
        assert len({widths[f"{prefix}{part}_proj.weight_packed"] for part in "qkv"}) == 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(str(tmp_path / "out"), whole=True)(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4
        )


def test_what_cannot_be_quantised_is_refused(tmp_path):
    with pytest.raises(CompressionError, match="no multiple of group_size 128"):
        quantized(tmp_path, group_size=128)
    assert not (tmp_path / "out").exists()
    (tmp_path / "moe").mkdir()
    with pytest.raises(CompressionError, match="quantised experts are not supported"):
        quantized(tmp_path / "moe", "mixtral")
    run(
        QuantizeConfig(
            model=str(tmp_path / "moe" / "model"),
            group_size=16,
            ignore=("experts",),
            calibration=text(tmp_path / "text"),
            gate=QUIET,
        ),
        tmp_path / "moe" / "out",
    )
    load_model(str(tmp_path / "moe" / "out"))


def test_scales_are_stored_in_the_dtype_of_the_model(tmp_path):
    model = saved("llama", tmp_path / "model", torch.bfloat16)
    calibration = text(tmp_path / "text")
    config = QuantizeConfig(
        model=str(tmp_path / "model"), method="rtn", group_size=16, calibration=calibration, gate=QUIET
    )
    run(config, tmp_path / "out")
    read = load_model(str(tmp_path / "out"), whole=True).model.layers[0].self_attn.q_proj.weight
    weight = model.model.layers[0].self_attn.q_proj.weight.float()
    scales = SafetensorSource(tmp_path / "out").tensor("model.layers.0.self_attn.q_proj.weight_scale")
    assert scales.dtype == torch.bfloat16
    codes = unpack(SafetensorSource(tmp_path / "out").tensor("model.layers.0.self_attn.q_proj.weight_packed"), 4, 32)
    assert torch.equal(read, codes.float() * scales.float().repeat_interleave(16, 1))
    assert float((read - weight).abs().max()) <= float(scales.max())


def test_rounding_needs_no_text(tmp_path):
    metrics = quantized(tmp_path, method="rtn", calibration=text(tmp_path / "text"))
    assert metrics["calibration_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "w4a4"}, "scheme"),
        ({"method": "gtpq"}, "did you mean 'gptq'"),
        ({"equalization": "smooth"}, "smoothquant"),
        ({"pattern": "2"}, "neither a share"),
    ],
)
def test_settings_that_cannot_work(fields, message):
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig(model="tiny-teacher", **fields)
