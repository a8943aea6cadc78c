"""The stage `export`: a model in, what another engine reads out, with the certificate that it does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import torch

from limbeck.checkpoint import Checkpoint, output_directory, write_manifest
from limbeck.compress.beside import copy_beside
from limbeck.compress.export.certificate import distance, write_certificate
from limbeck.compress.export.compressed_tensors import write_compressed
from limbeck.compress.export.consumers import ConsumerResult, in_llama_cpp, in_transformers, in_vllm, log_probs_of
from limbeck.compress.export.dense import write_dense
from limbeck.compress.export.gguf import context_length, family_of, write_weights
from limbeck.compress.export.gguf_blocks import TYPES, SourceWeights
from limbeck.compress.export.lint import Finding, lint
from limbeck.compress.export.probes import CertificateConfig, probes_of
from limbeck.compress.export.shards import write_index
from limbeck.compress.masks import MASK_FILE
from limbeck.compress.tokenizer_fit import check_tokens
from limbeck.config import checked
from limbeck.errors import ConfigError, nearest
from limbeck.ledger import Ledger
from limbeck.models.load import load_model, load_tokenizer, locate, model_hash
from limbeck.models.schemes import scheme_of
from limbeck.progress import console
from limbeck.stage import How

DEFAULT_GROUP = 128
FORMATS = ("compressed-tensors", "gguf", "dense")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    group_size: int | None = DEFAULT_GROUP
    """Inputs that share a scale in the weight-only schemes. Null: one scale a row."""
    dtype: str | None = None
    """float32 | bfloat16 | float16, of dense weights and scales; null: float32, as models are loaded, and as they are
    in a model that is carried over."""
    gguf_type: str = "q8_0"
    """f16 | q8_0 | q4_0, of the products. Codes that fit are carried over."""
    pre_tokenizer: str | None = None
    """gguf: llama.cpp's name for how the tokenizer splits text; null finds it out."""
    kv_cache: bool = False
    """compressed-tensors: tell engines to keep keys and values in 8 bits (E4M3), with scales from the probes."""
    certify: bool = True
    """Load the export in its consumers, compare log-probabilities and write the certificate."""
    probe: CertificateConfig = field(default_factory=CertificateConfig)
    """What they are compared on."""
    reference: str | None = None
    """A further model to tell the distance from, such as the one that was compressed."""
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
    _say_unused(config)
    source = _Source(config)
    with output_directory(out, overwrite=how.overwrite) as working:
        with ledger.phase("export"):
            counts, findings = _write(config, working, source)
        metrics: dict[str, Any] = {
            "format": config.format,
            "bytes_before": _weight_bytes(config.model),
            "bytes_after": sum(file.stat().st_size for file in _weight_files(working)),
        }
        if config.certify:
            with ledger.phase("certify"):
                metrics |= _certify(config, working, source, findings)
        _tell(findings, metrics)
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


class _Source:
    """The model that goes in, what it says of the probes, and all that can be refused before anything is written."""

    def __init__(self, config: ExportConfig) -> None:
        tokenizer = load_tokenizer(config.model)
        if config.format == "gguf":
            self.weights: SourceWeights | None = SourceWeights(config.model)
            self.model = self.weights.model
            family_of(self.model.config, self.weights.state)
            longest = context_length(self.model.config)
        else:
            self.weights = None
            # Rounded inputs go into the new file only where that is of the same kind.
            self.model = _load(config.model, rounds=config.format == "compressed-tensors")
            longest = int(getattr(self.model.config, "max_position_embeddings", 0) or 1 << 30)
        self.probes = probes_of(config.probe, tokenizer, longest)
        ids = torch.tensor([token for probe in self.probes.ids for token in probe])
        check_tokens(config.model, tokenizer, self.model.config.get_text_config().vocab_size, ids)
        self.log_probs = log_probs_of(self.model, self.probes.ids) if config.certify else []


def _load(name: str, rounds: bool = True) -> Any:
    """A model as a file's reference: files are written and proved in float32 on a CPU, wherever this runs."""
    return load_model(name, torch.float32, device="cpu", rounds=rounds, whole=True)


def _say_unused(config: ExportConfig) -> None:
    groups = None if config.scheme is None else scheme_of(config.scheme, config.group_size).group_size
    if config.scheme is not None and groups is None and config.group_size not in (None, DEFAULT_GROUP):
        console.print(
            f"export: {config.scheme} has one scale a row; group_size {config.group_size} is not used.", highlight=False
        )


def _write(config: ExportConfig, directory: Path, source: _Source) -> tuple[dict[str, Any], list[Finding]]:
    if source.weights is not None:
        written = write_weights(_gguf_file(config, directory), source.weights, config.gguf_type, config.pre_tokenizer)
        return dict(written.counts), written.findings
    dtype = DTYPES[config.dtype] if config.dtype else None
    counts: dict[str, Any] = {}
    if config.format == "dense":
        counts |= write_dense(directory, config.model, dtype)
    else:
        scheme = None if config.scheme is None else scheme_of(config.scheme, config.group_size)
        batches = [torch.tensor([ids]) for ids in source.probes.ids] if config.kv_cache else None
        counts["tensor_bytes"] = write_compressed(directory, config.model, source.model, scheme, dtype, batches)
    copy_beside(config.model, directory)
    mask = Path(locate(config.model).path) / MASK_FILE
    if mask.is_file():
        shutil.copyfile(mask, directory / MASK_FILE)
        # Without an index vLLM would read the mask as weights.
        write_index(directory)
    return counts, lint(directory)


def _certify(config: ExportConfig, directory: Path, source: _Source, findings: Sequence[Finding]) -> dict[str, Any]:
    """Compare with the source and in every consumer at hand; the export stays, whatever goes wrong here."""
    probes, export = source.probes, directory
    try:
        if source.weights is not None:
            export = _gguf_file(config, directory)
            ours = _as_in_file(source.weights, config.gguf_type, probes.ids)
            verdicts = [in_llama_cpp(export, ours, probes.ids, probes.texts)]
        else:
            ours = log_probs_of(_load(str(directory)), probes.ids)
            verdicts = [
                in_transformers(directory, ours, probes.ids),
                in_vllm(directory, ours, probes.ids, config.vllm_python),
            ]
        distances = [distance(config.model, source.log_probs, ours, _limit(config))]
        if config.reference is not None:
            reference = log_probs_of(_load(config.reference), probes.ids)
            distances.append(distance(config.reference, reference, ours))
    except Exception as error:
        verdicts, distances = [ConsumerResult("limbeck", "failed", " ".join(str(error).split())[:400])], []
    tree = write_certificate(directory, export, probes, verdicts, findings, distances)
    outcomes = {f"in_{found['consumer']}": found["outcome"] for found in tree["consumers"]}
    names = ("kl_from_source_nats", "kl_from_reference_nats")
    kl = {name: found.kl_nats for name, found in zip(names, distances, strict=False)}
    return {**outcomes, **kl, "is_clean": tree["is_clean"]}


def _as_in_file(weights: SourceWeights, gguf_type: str, probes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """What the source model says with its weights rounded as the GGUF file has them.

    By the source's own names and layout, so that a mistake in the file's shows.
    """
    rounded = {name: weights.rounded(name, gguf_type).view_as(tensor) for name, tensor in weights.state.items()}
    weights.model.load_state_dict(rounded, strict=False)
    return log_probs_of(weights.model, probes)


def _limit(config: ExportConfig) -> float | None:
    """Most that an export may be from its source, KL in nats a token; None where so few bits may lose anything."""
    if config.format == "gguf":
        return {"f16": 0.01, "q8_0": 0.05, "q4_0": 1.0}[config.gguf_type]
    if config.scheme is None:
        return 1e-3 if config.dtype is None else 0.01
    scheme = scheme_of(config.scheme, config.group_size)
    if scheme.bits == 8:
        return 0.05 if scheme.kind == "int" else 0.2
    return 1.0 if scheme.bits >= 4 else None


def _tell(findings: Sequence[Finding], metrics: dict[str, Any]) -> None:
    """What will go wrong elsewhere, on the console; the certificate says it too, where one is written."""
    for finding in findings:
        console.print(f"export: {finding.severity}, {finding.text}", highlight=False)
    if metrics.get("is_clean") is False:
        console.print("export: not clean; certificate.md says why.", style="red", highlight=False)


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
