"""The stage `export`: a model in, what another engine reads out, with the certificate that it does."""

from __future__ import annotations

import shutil
from dataclasses import field
from pathlib import Path
from typing import Any

import torch

from limbeck.checkpoint import Checkpoint, output_directory, write_manifest
from limbeck.compress.export.certificate import Probes, certify_directory, certify_gguf
from limbeck.compress.export.compressed_tensors import write_compressed
from limbeck.compress.export.dense import write_dense
from limbeck.compress.export.gguf import TYPES, write_gguf
from limbeck.compress.export.shards import copy_beside, write_index
from limbeck.compress.masks import MASK_FILE
from limbeck.config import checked
from limbeck.errors import ConfigError, nearest
from limbeck.ledger import Ledger
from limbeck.models.load import load_model, load_tokenizer, locate, model_hash
from limbeck.models.schemes import scheme_of
from limbeck.stage import How
from limbeck.traces.render import RenderConfig, render
from limbeck.traces.sources import TraceConfig, read_traces

FORMATS = ("compressed-tensors", "gguf", "dense")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUILT_IN_TEXT = (
    "The old clock on the wall had stopped at ten past four, and nobody had thought of winding it again.",
    "To add 348 and 1275, first add 300 to 1275, which gives 1575; then add 48, which gives 1623.\nSo 348+1275=1623.",
    "def mean(values):\n    return sum(values) / len(values)  # fails for an empty list\n",
    "Ein kleiner Satz, une phrase courte, y una frase más: naïve café, 東京, 3.14159, (a+b)*c != d.",
)
"""Prose, numbers, code, and other scripts: what tokenizers and engines disagree about."""


@checked
class ProbeConfig:
    """What the certificate compares log-probabilities on."""

    traces: TraceConfig | None = None
    """Traces, rendered whole. Null, with text null too: a few built-in sentences."""
    text: Path | None = None
    """A UTF-8 text file instead, a probe a paragraph."""
    sequences: int = 4
    """At most this many probes."""
    sequence_length_tokens: int = 32
    """Longer probes are cut to this; llama.cpp is asked once a token."""
    render: RenderConfig = field(default_factory=RenderConfig)
    """How traces become tokens."""

    def __post_init__(self) -> None:
        if self.traces is not None and self.text is not None:
            raise ConfigError("probe: set traces or text, not both")
        if self.sequences < 1 or self.sequence_length_tokens < 2:
            raise ConfigError("probe: sequences must be 1 or more, sequence_length_tokens 2 or more")


@checked
class ExportConfig:
    """Write a model for another engine, and load it there."""

    model: str
    """Directory, alias (tiny-teacher, tiny-student, smollm2-135m) or hub id."""
    format: str = "compressed-tensors"
    """compressed-tensors (transformers, vLLM, SGLang) | gguf (llama.cpp) | dense (plain Hugging Face)."""
    scheme: str | None = None
    """compressed-tensors: round a dense model to nearest, w4a16 | w8a16 | w8a8 | fp8-dynamic | ...; null: the model is
    quantised already."""
    group_size: int | None = 128
    """Inputs that share a scale in the weight-only schemes. Null: one scale a row."""
    dtype: str | None = None
    """float32 | bfloat16 | float16, of dense weights and scales; null: float32, as models are loaded."""
    gguf_type: str = "q8_0"
    """f16 | q8_0 | q4_0, of the products. Codes that fit are carried over."""
    pre_tokenizer: str | None = None
    """gguf: llama.cpp's name for how the tokenizer splits text; null finds it out."""
    kv_cache: bool = False
    """compressed-tensors: tell engines to keep keys and values in 8 bits (E4M3), with scales from the probes."""
    certify: bool = True
    """Load the export in its consumers, compare log-probabilities and write the certificate."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """What they are compared on."""
    vllm_python: Path | None = None
    """The Python of an environment that has vLLM."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("format", self.format, FORMATS),
            ("gguf_type", self.gguf_type, TYPES),
            ("dtype", self.dtype or "float32", DTYPES),
        ):
            if value not in known:
                raise ConfigError(f"{name} {value!r} is unknown; {nearest(value, known)}")
        if self.scheme is not None:
            scheme_of(self.scheme, self.group_size)
        if self.format != "compressed-tensors" and (self.scheme or self.kv_cache):
            raise ConfigError(f"scheme and kv_cache belong to format compressed-tensors, not {self.format}")


def run(config: ExportConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Write the export, its certificate and its manifest.

    Raises: ConfigError, ModelError or CompressionError when the model cannot be exported as asked.
    """
    ledger, key = Ledger(), model_hash(config.model)
    with output_directory(out, overwrite=how.overwrite) as working:
        probes = probes_of(config.probe, load_tokenizer(config.model))
        with ledger.phase("export"):
            counts = _write(config, working, probes)
        metrics: dict[str, Any] = {
            "format": config.format,
            "bytes_before": _weight_bytes(config.model),
            "bytes_after": sum(file.stat().st_size for file in _weight_files(working)),
        }
        if config.certify:
            with ledger.phase("certify"):
                metrics |= _certify(config, working, probes)
        write_manifest(
            working,
            stage="export",
            config=config,
            inputs={"model": key},
            ledger=ledger.as_dict(),
            metrics=metrics,
            counts=counts,
        )
    return Checkpoint(out)


def probes_of(config: ProbeConfig, tokenizer: Any) -> Probes:
    """Tokenize the probe set.

    Raises: ConfigError when nothing of two tokens is in it.
    """
    limit = config.sequence_length_tokens
    if config.traces is not None:
        traces, _ = read_traces(config.traces)
        sequences = [render(trace, tokenizer, config.render).input_ids.tolist() for trace in traces]
        texts = [trace.answer for trace in traces if trace.answer][: config.sequences]
        origin = config.traces.source
    else:
        origin = "built-in sentences" if config.text is None else config.text.name
        texts = list(BUILT_IN_TEXT) if config.text is None else _paragraphs(config.text)
        texts = texts[: config.sequences]
        sequences = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ids = [sequence[:limit] for sequence in sequences if len(sequence) > 1][: config.sequences]
    if not ids:
        raise ConfigError("probe: no text of two tokens or more; set probe.text or probe.traces.source.")
    return Probes(origin, ids, {text: tokenizer.encode(text, add_special_tokens=False) for text in texts})


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ConfigError(f"probe.text: {path} is missing or not UTF-8.") from error
    return [part for part in text.split("\n\n") if part.strip()]


def _write(config: ExportConfig, directory: Path, probes: Probes) -> dict[str, Any]:
    if config.format == "gguf":
        return dict(write_gguf(_gguf_file(config, directory), config.model, config.gguf_type, config.pre_tokenizer))
    dtype = DTYPES[config.dtype] if config.dtype else None
    counts: dict[str, Any] = {}
    if config.format == "dense":
        counts |= write_dense(directory, config.model, dtype)
    else:
        model = load_model(config.model)
        scheme = None if config.scheme is None else scheme_of(config.scheme, config.group_size)
        batches = [torch.tensor([ids]) for ids in probes.ids] if config.kv_cache else None
        counts["tensor_bytes"] = write_compressed(directory, config.model, model, scheme, dtype, batches)
    copy_beside(config.model, directory)
    mask = Path(locate(config.model).path) / MASK_FILE
    if mask.is_file():
        shutil.copyfile(mask, directory / MASK_FILE)
        # Without an index vLLM would read the mask as weights.
        write_index(directory)
    return counts


def _certify(config: ExportConfig, directory: Path, probes: Probes) -> dict[str, Any]:
    if config.format == "gguf":
        tree = certify_gguf(_gguf_file(config, directory), config.model, config.gguf_type, probes)
    else:
        tree = certify_directory(directory, probes, config.vllm_python)
    outcomes = {f"in_{found['consumer']}": found["outcome"] for found in tree["consumers"]}
    return {**outcomes, "is_clean": tree["is_clean"]}


def _gguf_file(config: ExportConfig, directory: Path) -> Path:
    return directory / f"model-{config.gguf_type}.gguf"


def _weight_files(directory: Path) -> list[Path]:
    return [*directory.glob("*.safetensors"), *directory.glob("*.gguf")]


def _weight_bytes(model: str) -> int | None:
    """Bytes of a local model's weights; None for the hub."""
    place = locate(model)
    if not place.is_local:
        return None
    files = [Path(place.path) / place.gguf_file] if place.gguf_file else _weight_files(Path(place.path))
    return sum(file.stat().st_size for file in files)
