"""Writing plain Hugging Face checkpoints: a quantised model made dense, for tools that read nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from limbeck.compress.export.shards import SHARD_BYTES
from limbeck.models.load import load_model, quantization_at, quiet


def write_dense(directory: Path, name: str, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Write weights and config.json.

    Args:
      directory: an existing one.
      name: of the model.
      dtype: of the weights; None is float32, which holds codes times scales exactly.
    Returns: `schemes_with_rounded_inputs` and `rounded_caches`, whose rounding a plain checkpoint cannot say.
    """
    quantization = quantization_at(name)
    model = load_model(name, dtype=dtype or torch.float32, rounds=False)
    with quiet():
        model.save_pretrained(directory, max_shard_size=SHARD_BYTES)
    schemes = [] if quantization is None else list(quantization.schemes.values())
    return {
        "schemes_with_rounded_inputs": sum(scheme.activations is not None for scheme in schemes),
        "rounded_caches": int(quantization is not None and quantization.kv_cache),
    }
