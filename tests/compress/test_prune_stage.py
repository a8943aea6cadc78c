"""The stage `prune`: the written checkpoint is what the walk solved, in a shape that stock code loads."""

import json

import pytest
import torch
import transformers
from made_models import made_model

from limbeck.compress import moments
from limbeck.compress.budget import BudgetConfig
from limbeck.compress.calibrate import CalibrationConfig
from limbeck.compress.fidelity import GateConfig
from limbeck.compress.masks import read_masks
from limbeck.compress.moments import MomentsConfig
from limbeck.compress.prune.stage import PruneConfig, run
from limbeck.compress.weights import SafetensorSource
from limbeck.errors import CheckpointError, CompressionError, ConfigError, ModelError
from limbeck.models.load import load_model, load_tokenizer

IDS = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(0))
QUIET = GateConfig(sequences=0)


def text(path, words=3000):
    """A text of the built-in tokenizer's symbols."""
    torch.manual_seed(0)
    path.write_text(" ".join("".join(map(str, row)) for row in torch.randint(0, 10, (words, 3)).tolist()))
    return CalibrationConfig(text=path, sequences=8, sequence_length_tokens=32)


def saved(family, path, dtype=torch.float32, **sizes):
    """A random model with the built-in tokenizer beside it."""
    model = made_model(family, **sizes).to(dtype)
    model.save_pretrained(path)
    load_tokenizer("tiny-teacher").save_pretrained(path)
    return model


def layers_of(out):
    return {layer["name"]: layer for layer in json.loads((out / "layers.json").read_text())}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-biased", "qwen2", "qwen3", "mistral", "gemma"])
@pytest.mark.parametrize("dense_targets", [False, True])
def test_the_smaller_model_is_the_masked_one(family, dense_targets, tmp_path):
    model = saved(family, tmp_path / "model")
    config = PruneConfig(
        model=str(tmp_path / "model"),
        neuron_sparsity=0.5,
        kv_group_sparsity=0.5,
        multiple_of=8,
        dense_targets=dense_targets,
        calibration=text(tmp_path / "text"),
        gate=QUIET,
    )
    metrics = run(config, tmp_path / "out").metrics
    smaller = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert smaller.config.intermediate_size == metrics["neurons"][1] == 24
    assert smaller.config.num_key_value_heads == metrics["kv_groups"][1] == 1
    assert sum(parameter.numel() for parameter in smaller.parameters()) < metrics["parameters"] + 4000
    found = layers_of(tmp_path / "out")
    with torch.no_grad():
        for number, (layer, small) in enumerate(zip(model.model.layers, smaller.model.layers, strict=True)):
            neurons = found[f"layers.{number}.mlp.down_proj"]["kept"]
            masked = torch.zeros_like(layer.mlp.down_proj.weight)
            masked[:, neurons] = small.mlp.down_proj.weight
            layer.mlp.down_proj.weight.copy_(masked)
            size = small.self_attn.o_proj.weight.shape[1]
            first = found[f"layers.{number}.self_attn.o_proj"]["kept"][0] * size
            masked = torch.zeros_like(layer.self_attn.o_proj.weight)
            masked[:, first : first + size] = small.self_attn.o_proj.weight
            layer.self_attn.o_proj.weight.copy_(masked)
        torch.testing.assert_close(smaller(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_experts_shrink_each_by_its_own_neurons(tmp_path):
    saved("mixtral", tmp_path / "model")
    config = PruneConfig(model=str(tmp_path / "model"), multiple_of=8, calibration=text(tmp_path / "text"), gate=QUIET)
    run(config, tmp_path / "out")
    smaller = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert smaller.config.intermediate_size == 32
    kept = [layer["kept"] for name, layer in layers_of(tmp_path / "out").items() if "layers.0.mlp.experts" in name]
    assert len(kept) == 4
    assert len({tuple(neurons) for neurons in kept}) > 1


def test_a_shorter_model_skips_layers(tmp_path):
    model = saved("gemma3", tmp_path / "model")
    config = PruneConfig(
        model=str(tmp_path / "model"), method="depth", drop_layers=1, calibration=text(tmp_path / "text"), gate=QUIET
    )
    removed = run(config, tmp_path / "out").metrics["removed_layers"]
    shorter = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    kinds = [kind for number, kind in enumerate(model.config.layer_types) if number not in removed]
    assert shorter.config.layer_types == kinds
    del model.model.layers[removed[0]]
    model.config.num_hidden_layers = 2
    model.config.layer_types = kinds
    with torch.no_grad():
        torch.testing.assert_close(shorter(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pattern_holds_in_the_file(method, dtype, tmp_path):
    saved("qwen3", tmp_path / "model", dtype)
    config = PruneConfig(
        model=str(tmp_path / "model"), method=method, pattern="2:4", calibration=text(tmp_path / "text"), gate=QUIET
    )
    metrics = run(config, tmp_path / "out").metrics
    whole = SafetensorSource(tmp_path / "model")
    assert metrics["parameters"] == sum(whole.tensor(name).numel() for name in whole.names()), "the mask is no weight"
    source, masks = SafetensorSource(tmp_path / "out"), read_masks(tmp_path / "out")
    assert len(masks) == metrics["layers"] == 21
    for name, mask in masks.items():
        weight = source.tensor(name)
        assert weight.dtype == dtype
        assert torch.equal(weight != 0, mask)
        assert ((weight != 0).view(-1, 4).sum(1) <= 2).all()
    assert metrics["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert "sparsity_config" not in (tmp_path / "out" / "config.json").read_text()


def test_zeros_of_a_pruned_model_stay(tmp_path):
    saved("llama", tmp_path / "model")
    first = PruneConfig(
        model=str(tmp_path / "model"), method="wanda", pattern="0.3", calibration=text(tmp_path / "text"), gate=QUIET
    )
    run(first, tmp_path / "first")
    second = PruneConfig(
        model=str(tmp_path / "first"), method="alps", pattern="0.6", calibration=text(tmp_path / "text"), gate=QUIET
    )
    run(second, tmp_path / "second")
    before, after = read_masks(tmp_path / "first"), read_masks(tmp_path / "second")
    for name, mask in after.items():
        assert not bool((mask & ~before[name]).any())
        assert float(mask.float().mean()) == pytest.approx(0.4, abs=0.01)


def test_stored_moments_give_the_first_group_of_the_walk(tmp_path):
    """Only the first group has seen nothing that was changed before it."""
    saved("llama", tmp_path / "model")
    calibration = text(tmp_path / "text")
    moments.run(MomentsConfig(model=str(tmp_path / "model"), calibration=calibration), tmp_path / "moments")
    shared = {"model": str(tmp_path / "model"), "method": "sparsegpt", "calibration": calibration, "gate": QUIET}
    run(PruneConfig(**shared), tmp_path / "walked")
    run(PruneConfig(**shared, moments=tmp_path / "moments"), tmp_path / "stored")
    walked, stored = (SafetensorSource(tmp_path / name) for name in ("walked", "stored"))
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(walked.tensor(first), stored.tensor(first))
    last = "model.layers.2.mlp.down_proj.weight"
    assert not torch.equal(walked.tensor(last), stored.tensor(last))


def test_moments_of_another_model_are_refused(tmp_path):
    saved("llama", tmp_path / "model")
    saved("qwen2", tmp_path / "other")
    calibration = text(tmp_path / "text")
    moments.run(MomentsConfig(model=str(tmp_path / "other"), calibration=calibration), tmp_path / "moments")
    config = PruneConfig(model=str(tmp_path / "model"), method="alps", moments=tmp_path / "moments", gate=QUIET)
    with pytest.raises(CheckpointError, match="of another model"):
        run(config, tmp_path / "out")


def test_the_gate_reports_what_fails(tmp_path):
    gate = GateConfig(sequences=4, labels=("1", "2"), max_kl_nats=0.0, max_label_change=0.0, max_perplexity_ratio=100)
    config = PruneConfig(model="tiny-student", neuron_sparsity=0.5, gate=gate)
    metrics = run(config, tmp_path / "out").metrics
    assert [failure.split()[0] for failure in metrics["gate_failures"]] == ["kl_nats", "label_change"]
    assert 0 <= metrics["held_out"]["label_swaps"] <= 1
    assert json.loads((tmp_path / "out" / "limbeck.json").read_text())["metrics"]["gate_failures"]


def test_one_calibration_token_is_enough(tmp_path):
    """H of rank one: damped, every method still gives the pattern and finite weights."""
    saved("llama", tmp_path / "model")
    (tmp_path / "text").write_text("7")
    calibration = CalibrationConfig(text=tmp_path / "text")
    for method, own in (("wanda", {}), ("sparsegpt", {}), ("alps", {}), ("osscar", {"multiple_of": 8})):
        config = PruneConfig(model=str(tmp_path / "model"), method=method, calibration=calibration, gate=QUIET, **own)
        run(config, tmp_path / method)
        load_model(str(tmp_path / method))


def test_damaged_and_unfit_models_are_refused(tmp_path):
    model = saved("llama", tmp_path / "model")
    calibration = text(tmp_path / "text")
    config = PruneConfig(
        model=str(tmp_path / "model"), method="wanda", pattern="5:7", calibration=calibration, gate=QUIET
    )
    with pytest.raises(CompressionError, match="no multiple of 7"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight: .* NaN"):
        run(
            PruneConfig(model=str(tmp_path / "model"), calibration=calibration, method="magnitude", gate=QUIET),
            tmp_path / "out",
        )
    shard = next((tmp_path / "model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"cannot (be read|load)"):
        run(PruneConfig(model=str(tmp_path / "model"), calibration=calibration, gate=QUIET), tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "alp"}, "did you mean 'alps'"),
        ({"pattern": "4:2"}, "neither a share of zeros"),
        ({"neuron_sparsity": 1.0}, "neuron_sparsity"),
        ({"method": "depth"}, "drop_layers"),
        ({"method": "alps", "drop_layers": 1}, "a setting of method osscar"),
    ],
)
def test_settings_that_cannot_work(fields, message):
    with pytest.raises(ConfigError, match=message):
        PruneConfig(model="tiny-teacher", **fields)


def test_a_budget_of_parameters_is_met(tmp_path):
    budget = BudgetConfig(target=1_200_000, neuron_step=0.125)
    calibration = CalibrationConfig(sequences=12)
    config = PruneConfig(model="tiny-teacher", budget=budget, calibration=calibration, gate=GateConfig(sequences=2))
    metrics = run(config, tmp_path / "out").metrics
    assert metrics["parameters"] <= 1_200_000
    costs = [step[3] for step in metrics["search"]]
    assert costs == sorted(costs, reverse=True)
    smaller = load_model(str(tmp_path / "out"), whole=True)
    assert sum(parameter.numel() for parameter in smaller.parameters()) == metrics["parameters"]


def test_a_model_without_traces_says_what_to_give(tmp_path):
    saved("llama", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"calibration.traces.source or calibration.text"):
        run(PruneConfig(model=str(tmp_path / "model")), tmp_path / "out")
