"""`limbeck export`: directories that others read, with the certificate beside them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from written_models import save_exportable

from limbeck.checkpoint import MANIFEST
from limbeck.cli import main
from limbeck.compress.blocks import Blocks
from limbeck.compress.export import consumers
from limbeck.compress.export.consumers import compare
from limbeck.compress.export.lint import lint
from limbeck.compress.export.probes import CertificateConfig
from limbeck.compress.export.shards import write_shards
from limbeck.compress.export.stage import ExportConfig, run
from limbeck.compress.masks import MASK_FILE, read_masks, write_masks
from limbeck.config import build
from limbeck.errors import CompressionError, ConfigError, ModelError
from limbeck.models.load import load_model

IDS = torch.tensor([[5, 17, 80, 3, 42, 9, 61]])


def export(model, out, **settings):
    return run(build(ExportConfig, {"model": str(model), **settings}), out).metrics


def logits(directory):
    with torch.inference_mode():
        return load_model(str(directory), whole=True)(IDS).logits


@pytest.fixture
def model(tmp_path):
    return save_exportable(tmp_path / "model", "llama-tied")


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8", "fp8-dynamic"])
def test_a_dense_model_is_rounded_written_and_certified(scheme, model, tmp_path):
    result = export(model, tmp_path / "out", scheme=scheme, group_size=32, dtype="bfloat16")
    assert result["is_clean"] and result["in_transformers"] == "agrees" and result["in_vllm"] == "not run"
    assert result["bytes_after"] < result["bytes_before"] / 2
    assert (logits(tmp_path / "out") - logits(model)).abs().max() < 1.5
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quantization_status"] == "compressed" and config["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["stage"] == "export" and set(manifest["ledger"]["seconds"]) == {"export", "certify"}
    assert manifest["metrics"]["bytes_after"] == result["bytes_after"]


def test_a_quantised_model_is_carried_over_and_made_dense(model, tmp_path):
    export(model, tmp_path / "q", scheme="w8a8", certify=False)
    export(tmp_path / "q", tmp_path / "again", certify=False)
    one, other = (load_file(tmp_path / part / "model.safetensors") for part in ("q", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    export(tmp_path / "q", tmp_path / "dense", format="dense")
    expected, found = (
        load_model(str(tmp_path / "q"), rounds=False, whole=True),
        load_model(str(tmp_path / "dense"), whole=True),
    )
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, found.state_dict()[name])
    with pytest.raises(ModelError, match="is quantised; compress the model that it was made of"):
        Blocks(str(tmp_path / "q"))
    assert Blocks(str(tmp_path / "dense")).source.names() >= {"model.norm.weight"}
    manifest = json.loads((tmp_path / "dense" / MANIFEST).read_text())
    assert manifest["counts"]["schemes_with_rounded_inputs"] == 1
    with pytest.raises(CompressionError, match="is quantised already"):
        export(tmp_path / "q", tmp_path / "no", scheme="w8a8")
    with pytest.raises(CompressionError, match="set scheme to round it"):
        export(model, tmp_path / "no")
    with pytest.raises(CompressionError, match="limbeck quantize for fp8-static"):
        export(model, tmp_path / "no", scheme="fp8-static")
    with pytest.raises(CompressionError, match="multiple of group_size 128"):
        export(model, tmp_path / "no", scheme="w4a16")
    assert not (tmp_path / "no").exists()


def test_a_quantised_cache_is_written_with_its_scales(model, tmp_path):
    result = export(model, tmp_path / "out", scheme="w8a8", kv_cache=True)
    assert result["is_clean"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.k_scale"].shape == (1,)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]


def test_masks_go_along(model, tmp_path):
    mask = {"model.layers.0.mlp.up_proj.weight": torch.ones(96, 64, dtype=torch.bool)}
    write_masks(tmp_path / "model", mask)
    export(model, tmp_path / "out", format="dense", certify=False)
    assert torch.equal(read_masks(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"], next(iter(mask.values())))
    # vLLM reads every safetensors file of a directory without an index, so there is one.
    assert [finding.code for finding in lint(tmp_path / "out")] == []


def test_shards_have_an_index_and_come_back(tmp_path):
    tensors = {f"t{i}": torch.full((4, 4), float(i)) for i in range(5)}
    assert write_shards(tmp_path, tensors.items(), shard_bytes=130) == 5 * 64
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name, tensor in tensors.items():
        with safe_open(tmp_path / index[name], framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), tensor)
            assert opened.metadata() == {"format": "pt"}
    assert not list(tmp_path.glob("*.partial"))


def changed(directory, change_config=None, change_tensors=None):
    config = directory / "config.json"
    tree, file = json.loads(config.read_text()), directory / "model.safetensors"
    tensors = load_file(file)
    if change_config:
        change_config(tree)
    if change_tensors:
        change_tensors(tensors)
    config.write_text(json.dumps(tree))
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("config", "tensors", "code"),
    [
        (lambda c: c["quantization_config"].pop("quantization_status"), None, "status"),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(symmetric=False),
            None,
            "asymmetric",
        ),
        (lambda c: c["quantization_config"].update(sparsity_config={"targets": ["Linear"]}), None, "sparsity"),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["targets"].append("Embedding"),
            None,
            "embedding",
        ),
        (None, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}), "tied-head"),
        (None, lambda t: t.update({"model.embed_tokens.weight_scale": torch.ones(4, 1)}), "embedding"),
        (None, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(100), "range"),
        (None, lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].zero_(), "scales"),
        (lambda c: c["quantization_config"].update(format="marlin-24"), None, "unreadable"),
    ],
)
def test_lint_finds_every_trap(config, tensors, code, model, tmp_path):
    export(model, tmp_path / "out", scheme="w8a8", certify=False)
    assert lint(tmp_path / "out") == []
    changed(tmp_path / "out", config, tensors)
    assert code in {finding.code for finding in lint(tmp_path / "out")}


def test_lint_names_sizes_that_kernels_do_not_have(model, tmp_path):
    export(model, tmp_path / "out", scheme="w3a16", group_size=32, certify=False)
    found = {finding.code: finding for finding in lint(tmp_path / "out")}
    assert set(found) == {"sizes", "bits"} and found["sizes"].severity == "warning"
    assert "(14 times)" in found["bits"].text


def test_a_certificate_tells_a_wrong_file_from_a_right_one(model, tmp_path, monkeypatch):
    export(model, tmp_path / "out", scheme="w8a8")
    page = (tmp_path / "out" / "certificate.md").read_text()
    assert "**clean**" in page and "| vllm | not run |" in page
    tree = json.loads((tmp_path / "out" / "certificate.json").read_text())
    (transformers_found, _) = tree["consumers"]
    assert (
        transformers_found["max_difference"] <= 1e-6 and transformers_found["positions"] == tree["probes"]["tokens"] - 4
    )

    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    exact = [[{token: float(row[token]) for token in row.topk(4).indices.tolist()} for row in rows]]
    assert compare("transformers", [rows], exact).outcome == "agrees"
    exact[0][1] = {token: value + 0.01 for token, value in exact[0][1].items()}
    verdict = compare("transformers", [rows], exact)
    assert verdict.outcome == "differs" and verdict.max_difference == pytest.approx(0.01, rel=1e-3)
    exact[0][1] = {0: float("nan")}
    assert compare("vllm", [rows], exact).outcome == "differs"


def test_consumers_that_are_not_there_are_said_to_be_not_run(model, tmp_path, monkeypatch):
    """A certificate without any consumer is not clean, and one that breaks off is a failure, not a silence."""
    result = export(model, tmp_path / "a", scheme="w8a8", vllm_python=str(tmp_path / "no-python"))
    assert result["in_transformers"] == "agrees" and result["in_vllm"] == "failed" and not result["is_clean"]
    monkeypatch.setattr(consumers.importlib.util, "find_spec", lambda name: None)
    assert export(model, tmp_path / "b", scheme="w8a8")["in_transformers"] == "not run"
    assert "needs pip install compressed-tensors" in (tmp_path / "b" / "certificate.md").read_text()
    rows = [torch.zeros(1, 4)]
    assert consumers.in_llama_cpp(tmp_path, rows, [[1, 2]], {}).outcome == "not run"
    assert not json.loads((tmp_path / "b" / "certificate.json").read_text())["is_clean"]


def test_settings_are_checked(tmp_path):
    for settings, message in (
        ({"format": "onnx"}, "format 'onnx' is unknown"),
        ({"scheme": "w4a8"}, "scheme 'w4a8' is unknown"),
        ({"format": "gguf", "scheme": "w8a8"}, "belong to format compressed-tensors"),
        ({"gguf_type": "q4_k"}, "gguf_type 'q4_k' is unknown"),
        ({"probe": {"sequence_length_tokens": 1}}, "2 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(ExportConfig, {"model": "tiny-student", **settings})
    with pytest.raises(ConfigError, match="missing or not UTF-8"):
        export("tiny-student", tmp_path / "out", format="dense", probe={"text": str(tmp_path / "none.txt")})
    assert CertificateConfig().sequences == 4


def test_the_command_on_a_built_in_model_with_traces(tmp_path, capsys):
    arguments = ["export", "--model", "tiny-student", "--scheme", "w8a8", "--out", str(tmp_path / "out")]
    arguments += ["--probe.traces.source", "builtin:chain", "--probe.traces.num-traces", "3", "--json"]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["is_clean"]
    assert load_model(str(tmp_path / "out")).config.model_type == "llama"
    assert (tmp_path / "out" / MASK_FILE).exists() is False
