"""Exports against the model that went in, and what is refused or told where an engine would do otherwise."""

import json

import pytest
import torch
import transformers
from made_tokenizers import byte_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, normalizers, pre_tokenizers
from written_models import save_exportable

from limbeck.cli import main
from limbeck.compress.export.certificate import Difference, distance, is_clean
from limbeck.compress.export.consumers import ConsumerResult
from limbeck.compress.export.lint import Finding, lint
from limbeck.compress.export.probes import BUILT_IN_TEXT
from limbeck.compress.export.stage import ExportConfig, run
from limbeck.config import build
from limbeck.errors import CompressionError, ModelError
from limbeck.models.load import load_tokenizer

GGUF = {"format": "gguf", "gguf_type": "f16"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


def export(model, out, **settings):
    return run(build(ExportConfig, {"model": str(model), **settings}), out).metrics


def rewrite(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")


def certificate(out):
    return json.loads((out / "certificate.json").read_text())


def test_the_distance_from_the_source_and_from_a_reference_is_told(tmp_path):
    save_exportable(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "q", scheme="w4a16", group_size=32)
    found = export(tmp_path / "q", tmp_path / "again", reference=str(tmp_path / "model"))
    assert found["kl_from_source_nats"] == pytest.approx(0, abs=1e-6) and found["is_clean"] is True
    assert found["kl_from_reference_nats"] > 1e-3
    assert found["kl_from_reference_nats"] == export_kl(tmp_path / "model", tmp_path / "again")


def export_kl(source, out):
    """KL(source || out) a token on the certificate's probes, by stock transformers."""
    probes = [ids[:32] for ids in map(load_tokenizer(str(source)).encode, BUILT_IN_TEXT)]
    kl, count = 0.0, 0
    models = [transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (source, out)]
    for ids in probes:
        with torch.no_grad():
            p, q = (model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for model in models)
        kl, count = kl + float((p.exp() * (p - q)).sum(dtype=torch.float64)), count + len(ids) - 1
    return pytest.approx(kl / count, rel=1e-3)


def test_a_mean_divergence_by_hand():
    p, q = (torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(), torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log())
    found = distance("m", [p], [q], 0.05)
    expected = (0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()) / 2
    assert found.kl_nats == pytest.approx(float(expected)) and not found.is_near
    assert distance("m", [p], [q * float("nan")], 1.0).kl_nats is None


@pytest.mark.parametrize(
    ("outcome", "severity", "kl", "expected"),
    [
        ("agrees", "warning", 0.01, True),
        ("agrees", "error", 0.01, False),
        ("agrees", "warning", 0.2, False),
        ("agrees", "warning", None, False),
        ("differs", "warning", 0.01, False),
        ("failed", "warning", 0.01, False),
        ("not run", "warning", 0.01, None),
        ("not run", "error", 0.01, False),
    ],
)
def test_what_is_clean(outcome, severity, kl, expected):
    found = is_clean([ConsumerResult("x", outcome)], [Finding("c", severity, "t")], [Difference("m", kl, 1.0, 0.1)])
    assert found is expected


def test_a_layer_that_q8_0_loses_is_far_from_its_source(tmp_path):
    save_exportable(tmp_path / "model")

    def tiny(weights):
        weights["model.layers.0.mlp.up_proj.weight"] *= 1e-7
        weights["model.layers.0.mlp.down_proj.weight"] *= 1e7

    rewrite(tmp_path / "model", tiny)
    found = export(tmp_path / "model", tmp_path / "out", format="gguf", gguf_type="q8_0")
    assert found["is_clean"] is False and found["kl_from_source_nats"] > 0.05


def test_one_of_three_left_dense_is_found_and_ends_with_exit_code_1(tmp_path, capfd):
    save_exportable(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "q", scheme="w8a8", certify=False)
    twin = load_file(tmp_path / "model" / "model.safetensors")

    def dense(weights):
        del weights["model.layers.1.self_attn.k_proj.weight_scale"]
        weights["model.layers.1.self_attn.k_proj.weight"] = twin["model.layers.1.self_attn.k_proj.weight"]

    rewrite(tmp_path / "q", dense)
    path = tmp_path / "q" / "config.json"
    tree = json.loads(path.read_text())
    tree["quantization_config"]["ignore"].append("model.layers.1.self_attn.k_proj")
    path.write_text(json.dumps(tree))
    assert [finding.code for finding in lint(tmp_path / "q") if finding.severity == "error"] == ["fused"]
    with pytest.raises(SystemExit) as ended:
        main(["export", "--model", str(tmp_path / "q"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert "refuses such a file" in " ".join("".join(capfd.readouterr()).split())


def test_what_is_carried_over_takes_another_dtype(tmp_path):
    save_exportable(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "q", scheme="w4a16", group_size=32, dtype="bfloat16")
    export(tmp_path / "q", tmp_path / "out", dtype="float16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {tensor.dtype for name, tensor in tensors.items() if name.endswith(("_scale", "m.weight"))}
    assert kinds == {torch.float16} and json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    "settings",
    [GGUF, {"format": "dense", "dtype": "float16"}, {"scheme": "w8a8", "dtype": "float16"}],
    ids=["gguf", "dense", "compressed-tensors"],
)
def test_a_weight_beyond_float16_is_named(settings, tmp_path):
    save_exportable(tmp_path / "model")
    rewrite(tmp_path / "model", lambda w: w["model.embed_tokens.weight"][5, 5].fill_(1e6))
    with pytest.raises(CompressionError, match=r"model\.embed_tokens\.weight: holds 1e\+06, beyond"):
        export(tmp_path / "model", tmp_path / "out", **settings)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type 'llama3'"),
        ("qwen3", {"attention_bias": True}, r"q_proj\.bias: llama\.cpp's qwen3 has no place"),
        ("gemma", {"tie_word_embeddings": False}, "no head but the embedding"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(family, changes, message, tmp_path):
    save_exportable(tmp_path / "model", family, **changes)
    with pytest.raises(CompressionError, match=message):
        export(tmp_path / "model", tmp_path / "out", **GGUF)


def with_tokenizer(path, normalizer=None, token=None):
    save_exportable(path)
    tokenizer = byte_tokenizer(merges=["Ġ t", "Ġ a", "h e", "Ġt he", "e r"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    if token is not None:
        tokenizer.add_tokens([token])
    tokenizer.save_pretrained(path)


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Lowercase(),
        normalizers.Strip(),
        normalizers.Sequence([normalizers.NFC(), normalizers.Replace("a", "b")]),
    ],
    ids=["lower", "strip", "sequence"],
)
def test_tokenizers_that_change_text_first_are_refused(normalizer, tmp_path):
    with_tokenizer(tmp_path / "model", normalizer)
    with pytest.raises(CompressionError, match="changes text before it splits it"):
        export(tmp_path / "model", tmp_path / "out", **GGUF)


def test_the_normal_form_is_told_and_greedy_tokens_are_found(tmp_path):
    with_tokenizer(tmp_path / "model", normalizers.NFC(), AddedToken("[REF]", lstrip=True))
    export(tmp_path / "model", tmp_path / "out", **GGUF)
    found = {finding["code"]: finding["severity"] for finding in certificate(tmp_path / "out")["findings"]}
    assert (
        found == {"normalizer": "warning", "added-tokens": "error"}
        and certificate(tmp_path / "out")["is_clean"] is False
    )


def test_all_chat_templates_go_along(tmp_path):
    gguf = pytest.importorskip("gguf")
    with_tokenizer(tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ messages }}{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "gguf", certify=False, **GGUF)
    fields = gguf.GGUFReader(next((tmp_path / "gguf").glob("*.gguf"))).fields
    assert {"tokenizer.chat_template", "tokenizer.chat_template.tools"} <= set(fields)
    export(tmp_path / "model", tmp_path / "out", scheme="w8a8", certify=False)
    assert set(transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template) == {"default", "tools"}


def test_tokens_beyond_the_embedding_are_refused(tmp_path):
    save_exportable(tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    tokenizer.add_tokens([f"<{number}>" for number in range(9)])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="has no embedding"):
        export(tmp_path / "model", tmp_path / "out", scheme="w8a8")
