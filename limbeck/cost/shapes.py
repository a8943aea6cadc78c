"""Models without their weights: names to shapes, also of published models that are not on this machine.

A stage is predicted from a config alone. The module tree is built on torch's meta device, so that sizes come from the
same code as those of a run (`models.anatomy.sizes_of`), whatever the model weighs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from limbeck.errors import ConfigError, ModelError, nearest
from limbeck.models.anatomy import Sizes, sizes_of
from limbeck.models.load import BUILT_IN, GGUF_ALIASES, locate, quiet, rows_read
from limbeck.models.tiny import ScratchConfig, scratch_config, symbol_tokenizer

_QWEN3: dict[str, Any] = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
_QWEN25: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 152064, "tie_word_embeddings": False}
_LLAMA3: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256}


def _shape(base: dict[str, Any], width: int, layers: int, heads: int, neurons: int, **more: Any) -> dict[str, Any]:
    names = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**base, **names, "intermediate_size": neurons, "max_position_embeddings": 40960, **more}


PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _shape(_QWEN3, 1024, 28, 16, 3072, tie_word_embeddings=True),
    "qwen3-1.7b": _shape(_QWEN3, 2048, 28, 16, 6144, tie_word_embeddings=True),
    "qwen3-4b": _shape(_QWEN3, 2560, 36, 32, 9728, tie_word_embeddings=True),
    "qwen3-8b": _shape(_QWEN3, 4096, 36, 32, 12288, tie_word_embeddings=False),
    "qwen3-14b": _shape(_QWEN3, 5120, 40, 40, 17408, tie_word_embeddings=False),
    "qwen3-32b": _shape(_QWEN3, 5120, 64, 64, 25600, tie_word_embeddings=False),
    "qwen2.5-7b": _shape(_QWEN25, 3584, 28, 28, 18944, num_key_value_heads=4),
    "qwen2.5-32b": _shape(_QWEN25, 5120, 64, 40, 27648, num_key_value_heads=8),
    "llama-3.2-1b": _shape(_LLAMA3, 2048, 16, 32, 8192, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _shape(_LLAMA3, 3072, 28, 24, 8192, head_dim=128, tie_word_embeddings=True),
    "llama-3.1-8b": _shape(_LLAMA3, 4096, 32, 32, 14336, head_dim=128, tie_word_embeddings=False),
    "llama-3.3-70b": _shape(_LLAMA3, 8192, 80, 64, 28672, head_dim=128, tie_word_embeddings=False),
}
"""Published shapes, from the models' own config.json; `tests/scale/test_scale_shapes.py` holds them to their
parameter counts. A base or instruct model has the shape of its family's size."""


class Dims(NamedTuple):
    """The widths that memory and traffic are counted in."""

    layers: int
    width: int
    """D."""
    queries: int
    """Query heads x head size."""
    keys: int
    """KV heads x head size."""
    heads: int
    neurons: int
    """F."""
    vocab: int
    """Rows of the head, padding included."""
    is_tied: bool
    """Whether the head is the embedding."""

    @classmethod
    def of(cls, config: Any) -> Dims:
        """The widths of a dense Llama-type config.

        Raises: ConfigError for a mixture of experts.
        """
        if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
            raise ConfigError(f"{config.model_type}: mixtures of experts cannot be predicted yet; name a dense model.")
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            queries=heads * head_size,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
            heads=heads,
            neurons=config.intermediate_size,
            vocab=config.vocab_size,
            is_tied=bool(config.tie_word_embeddings),
        )


def published_name(name: str) -> str | None:
    """The entry of PUBLISHED that `name` (Qwen/Qwen3-8B-Base, qwen3-8b, Llama-3.1-8B-Instruct) stands for."""
    short = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    for ending in ("-base", "-instruct"):
        short = short.removesuffix(ending)
    return short if short in PUBLISHED else None


def config_of(name: str) -> Any:
    """The transformers config of a model: a directory, an alias, a published shape, or a hub id.

    Raises: ModelError, naming the known shapes, when it is none of them or its config cannot be read.
    """
    short = published_name(name)
    if short is not None and not Path(name).is_dir():
        return transformers.AutoConfig.for_model(**PUBLISHED[short])
    place = locate(name) if "/" in name or Path(name).exists() or name in (*BUILT_IN, *GGUF_ALIASES) else None
    if place is None:
        raise ModelError(f"{name}: no such model or shape; {nearest(name, [*PUBLISHED, *BUILT_IN, *GGUF_ALIASES])}")
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(
                place.path, gguf_file=place.gguf_file, local_files_only=place.is_local
            )
        except Exception as error:  # transformers raises many kinds; each becomes one line with its cause kept
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{name}: cannot read its config ({reason}). Shapes known without a download: {', '.join(PUBLISHED)}."
            ) from error
    rows = rows_read(place, name)
    if rows is not None and getattr(config, "vocab_size", 0) > rows:
        config.vocab_size = rows
    return config


def scratch_shape(config: ScratchConfig, tokenizer: Any = None) -> Any:
    """The transformers config of a model from scratch, for a tokenizer or for the built-in one."""
    return scratch_config(config, symbol_tokenizer() if tokenizer is None else tokenizer)


def on_meta(config: Any) -> Any:
    """The causal LM of a config, float32, without memory for its weights."""
    with torch.device("meta"), quiet():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def frozen_sizes(config: Any, vocab_size: int | None = None) -> Sizes:
    """Sizes of a model that only reads: a teacher, a model that is sampled or compressed.

    Args:
      vocab_size: the tokenizer's real vocabulary; all rows of the head when None.
    """
    return sizes_of(on_meta(config).requires_grad_(False), vocab_size)
