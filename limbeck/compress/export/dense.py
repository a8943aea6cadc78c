"""Writing plain Hugging Face checkpoints: a quantised model made dense, for tools that read nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from limbeck.checkpoint import write_json
from limbeck.compress.export.shards import SHARD_BYTES, is_tied
from limbeck.compress.weights import narrowed
from limbeck.errors import ModelError
from limbeck.models.load import load_model, quantization_at, quiet
from limbeck.models.weight_files import writing


def write_dense(directory: Path, name: str, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Write weights and config.json.

    Args:
      directory: an existing one.
      name: of the model.
      dtype: of the weights; None is float32, which holds codes times scales exactly.
    Returns: `schemes_with_rounded_inputs` and `rounded_caches`, whose rounding a plain checkpoint cannot say.
    """
    quantization = quantization_at(name)
    model = _loaded(name, dtype or torch.float32)
    with quiet(), writing(directory):
        model.save_pretrained(directory, max_shard_size=SHARD_BYTES)
    if not is_tied(model):
        path = directory / "config.json"
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"tie_word_embeddings": False})
    schemes = [] if quantization is None else list(quantization.schemes.values())
    return {
        "schemes_with_rounded_inputs": sum(scheme.activations is not None for scheme in schemes),
        "rounded_caches": int(quantization is not None and quantization.kv_cache),
    }


def _loaded(name: str, dtype: torch.dtype) -> Any:
    """The dense model in a dtype.

    Raises: CompressionError for a weight that the dtype does not hold.
    """
    try:
        return load_model(name, dtype, device="cpu", rounds=False, whole=True)
    except ModelError:
        if dtype != torch.float32:
            for weight, tensor in (
                load_model(name, torch.float32, device="cpu", rounds=False, whole=True).state_dict().items()
            ):
                narrowed(weight, tensor, dtype)
        raise
