"""What is known to go wrong with compressed-tensors checkpoints in one engine or another, looked for in a directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.compress.masks import MASK_FILE
from limbeck.compress.quantize.fused import parted
from limbeck.errors import LimbeckError
from limbeck.models.quantized import Quantization, QuantizedLayer, quantization_of, read_tensors, split_tensors
from limbeck.models.schemes import STATUS, Scheme
from limbeck.models.weight_files import INDEX


class Finding(NamedTuple):
    """One thing found."""

    code: str
    severity: str
    """error: some engine fails or computes something else. warning: some engine is slow, or has no kernel."""
    text: str


def lint(directory: Path) -> list[Finding]:
    """Look for the known traps in a checkpoint; one finding a kind, empty when there is none."""
    tree = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    names = read_tensors(directory)
    found = [*_of_config(tree), *_of_names(tree, set(names)), *_of_files(directory)]
    try:
        quantization = quantization_of(tree, "config.json")
        found += [] if quantization is None else _of_quantization(names, quantization)
    except LimbeckError as error:
        found.append(Finding("unreadable", "error", str(error)))
    kinds: dict[str, list[Finding]] = {}
    for finding in found:
        kinds.setdefault(finding.code, []).append(finding)
    return [
        first if len(alike) == 1 else first._replace(text=f"{first.text} ({len(alike)} times)")
        for alike in kinds.values()
        for first in alike[:1]
    ]


def _of_quantization(names: Mapping[str, Tensor], quantization: Quantization) -> Iterator[Finding]:
    """Raises: LimbeckError when the tensors are not what the config says."""
    layers, _ = split_tensors(names, quantization)
    for name, layer in layers.items():
        yield from _of_layer(name, layer)
    linears = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    schemes = {name: layer.stored.scheme for name, layer in layers.items()}
    for text in parted(dict.fromkeys([*linears, *layers]), schemes):
        yield Finding("fused", "error", text)
    if quantization.kv_cache and not any(name.endswith(".k_scale") for name in names):
        yield Finding("cache-scales", "error", "kv_cache_scheme is set, but there is no k_scale")


def _of_config(tree: dict[str, Any]) -> Iterator[Finding]:
    quantization = tree.get("quantization_config") or {}
    if not quantization:
        return
    if quantization.get("quantization_status") != STATUS:
        yield Finding("status", "error", "no quantization_status: compressed; transformers computes with wrong weights")
    if (quantization.get("sparsity_config") or {}).get("targets"):
        yield Finding("sparsity", "error", "sparsity_config names targets; vLLM refuses the file")
    yield from _of_groups(quantization.get("config_groups") or {})


def _of_groups(groups: Mapping[str, Any]) -> Iterator[Finding]:
    for name, group in groups.items():
        if not (group.get("weights") or {}).get("symmetric", True):
            yield Finding("asymmetric", "error", f"{name}: asymmetric weights; transformers cannot load them")
        if "Embedding" in group.get("targets", ()):
            yield Finding("embedding", "error", f"{name}: quantised embeddings fail in many vLLM models")


def _of_names(tree: dict[str, Any], names: set[str]) -> Iterator[Finding]:
    if tree.get("tie_word_embeddings") and any(name.startswith("lm_head.") for name in names):
        yield Finding("tied-head", "error", "the head is tied to the embedding, and written all the same; SGLang fails")
    if any("embed_tokens.weight_" in name for name in names):
        yield Finding("embedding", "error", "quantised embeddings fail in many vLLM models")
    if any(name.startswith("lm_head.weight_") for name in names):
        yield Finding("head", "warning", "the head is quantised; not every engine reads that")
    if any(name.endswith(".weight_zero_point") for name in names):
        yield Finding("asymmetric", "error", "zero points are stored; transformers cannot load them")


def _of_files(directory: Path) -> Iterator[Finding]:
    if (directory / MASK_FILE).exists() and not (directory / INDEX).exists():
        yield Finding("mask", "error", f"{MASK_FILE} without a safetensors index: vLLM would read it as weights")
    if not (directory / "tokenizer_config.json").exists() and not (directory / "tokenizer.json").exists():
        yield Finding("tokenizer", "warning", "no tokenizer; engines want token ids then")


def _of_layer(name: str, layer: QuantizedLayer) -> Iterator[Finding]:
    codes, scales, scheme = layer.stored
    if not bool((torch.isfinite(scales.float()) & (scales.float() > 0)).all()):
        yield Finding("scales", "error", f"{name}: a scale is zero, negative or not finite")
    if scheme.format == "pack-quantized" and scheme.bits not in (4, 8):
        yield Finding("bits", "warning", f"{name}: {scheme.bits} bits; vLLM has kernels for 4 and 8")
    yield from _of_sizes(name, codes.shape, scheme)
    if scheme.format == "int-quantized" and int(codes.abs().max()) > 63:
        yield Finding("range", "warning", f"{name}: codes beyond 63, which AVX2 engines saturate")


def _of_sizes(name: str, shape: Sequence[int], scheme: Scheme) -> Iterator[Finding]:
    outputs, inputs = shape
    if scheme.format == "pack-quantized" and (outputs % 64 or inputs % 128):
        yield Finding(
            "sizes", "warning", f"{name}: {outputs} x {inputs}; fast 4-bit kernels want multiples of 64 and 128"
        )
    elif outputs % 32 or inputs % 32:
        yield Finding("sizes", "warning", f"{name}: {outputs} x {inputs}; kernels want multiples of 32")
