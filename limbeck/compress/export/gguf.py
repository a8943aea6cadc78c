"""Writing GGUF files for llama.cpp, from any Llama-type directory, dense or quantised.

Products are stored as F16, Q8_0 or Q4_0. Codes that fit a block of 32 are carried over as they are: 4-bit groups of a
multiple of 32 become Q4_0 with the same codes, int8 channels become Q8_0; only their scales are rounded, to float16.
Inputs that a scheme rounds are not: llama.cpp rounds inputs in its own way.

llama.cpp turns neighbouring pairs of a Llama head's elements, transformers turns halves, so the rows of query and key
change places. Source: the GGUF specification and llama.cpp's model definitions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from limbeck.compress.export.gguf_blocks import TYPES, SourceWeights, fits, library
from limbeck.compress.export.gguf_vocabulary import add_vocabulary
from limbeck.compress.export.lint import Finding
from limbeck.errors import CompressionError, nearest
from limbeck.models.load import load_tokenizer
from limbeck.models.weight_files import writing

_FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2}


_ATTENTION = ("q_proj", "k_proj", "v_proj")
_ALL = (*_ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj")


class GgufFamily(NamedTuple):
    """How llama.cpp computes a model type of transformers."""

    architecture: str
    is_permuted: bool = False
    """Whether it turns neighbouring pairs of query and key."""
    norm_offset: float = 0.0
    """Added to the gain of a norm."""
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    """Linear layers that may have one."""
    ropes: tuple[str, ...] = ("default", "linear")
    has_own_head: bool = True
    """Whether it reads a head that is not the embedding."""


FAMILIES = {
    "llama": GgufFamily("llama", is_permuted=True, biases=_ALL, ropes=("default", "linear", "llama3")),
    "mistral": GgufFamily("llama", is_permuted=True, biases=_ALL, ropes=("default", "linear", "llama3")),
    "qwen2": GgufFamily("qwen2", biases=_ATTENTION),
    "qwen3": GgufFamily("qwen3"),
    "gemma": GgufFamily("gemma", norm_offset=1.0, activation="gelu_pytorch_tanh", has_own_head=False),
}


class GgufFile(NamedTuple):
    """What came of a file."""

    counts: dict[str, int]
    """Tensors by type, and those whose codes were carried over."""
    findings: list[Finding]
    """What llama.cpp will do otherwise."""


def write_gguf(path: Path, name: str, gguf_type: str, pre_tokenizer: str | None = None) -> dict[str, int]:
    """Write one file with weights, sizes, tokenizer and chat template; the arguments of `write_weights`."""
    if gguf_type not in TYPES:
        raise CompressionError(f"gguf_type {gguf_type!r} is unknown; {nearest(gguf_type, TYPES)}.")
    return write_weights(path, SourceWeights(name), gguf_type, pre_tokenizer).counts


def write_weights(path: Path, weights: SourceWeights, gguf_type: str, pre_tokenizer: str | None = None) -> GgufFile:
    """Write one file with weights, sizes, tokenizer and chat template.

    Args:
      path: of the file.
      weights: of the model.
      gguf_type: f16, q8_0 or q4_0, for the products.
      pre_tokenizer: llama.cpp's name for how the tokenizer splits text; None finds it out.
    Raises: CompressionError for a model or a tokenizer that has no place in the format; CheckpointError when the disk
      takes no more.
    """
    gguf = library()
    family = family_of(weights.config, weights.state)
    writer = gguf.GGUFWriter(path, family.architecture)
    _add_sizes(writer, weights.config)
    writer.add_file_type(_FILE_TYPES[gguf_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokenizer = load_tokenizer(weights.name, pads=False)
    findings = add_vocabulary(writer, tokenizer, weights.config.vocab_size, pre_tokenizer)
    counts = {"carried_over": 0}
    for place, data, kind, is_carried in _tensors(weights, family, gguf_type):
        writer.add_tensor(place, data, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
        counts[kind] = counts.get(kind, 0) + 1
        counts["carried_over"] += is_carried
    with writing(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return GgufFile(counts, [*findings, *_stays_f16(weights, gguf_type)])


def _stays_f16(weights: SourceWeights, gguf_type: str) -> list[Finding]:
    names = [
        name
        for name, tensor in weights.state.items()
        if tensor.ndim > 1 and gguf_type != "f16" and weights.block_type(name, gguf_type) == "f16"
    ]
    text = f"{len(names)} tensors stay F16: their rows are no multiple of 32 ({names[0]})" if names else ""
    return [Finding("sizes", "warning", text)] if names else []


def family_of(config: Any, names: Iterable[str] = ()) -> GgufFamily:
    """How llama.cpp computes a model of a config and of weights with some names.

    Raises: CompressionError for a model type, or an option of it, that it would compute otherwise or not load.
    """
    if config.model_type not in FAMILIES:
        raise CompressionError(
            f"model type {config.model_type!r} has no GGUF mapping here; {nearest(config.model_type, FAMILIES)}."
        )
    family, rope = FAMILIES[config.model_type], config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in family.ropes:
        raise CompressionError(
            f"rope_type {kind!r}: llama.cpp's {family.architecture} computes {', '.join(family.ropes)} only."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CompressionError("partial_rotary_factor: llama.cpp turns whole heads in such models.")
    if config.hidden_act != family.activation:
        raise CompressionError(f"llama.cpp computes {family.activation} in such models, not {config.hidden_act}.")
    for name in names:
        if name.endswith(".bias") and name.split(".")[-2] not in family.biases:
            raise CompressionError(f"{name}: llama.cpp's {family.architecture} has no place for this bias.")
        if name == "lm_head.weight" and not family.has_own_head:
            raise CompressionError(f"{name}: llama.cpp's {family.architecture} has no head but the embedding.")
    return family


def context_length(config: Any) -> int:
    """Tokens that the file says a model may read: within its window, where it has one.

    There it is an ordinary one, and llama.cpp has no window for these architectures.
    """
    window = getattr(config, "sliding_window", None)
    is_windowed = window and getattr(config, "use_sliding_window", True)
    return int(min(config.max_position_embeddings, window if is_windowed else 1 << 30))


def _add_sizes(writer: Any, config: Any) -> None:
    writer.add_context_length(context_length(config))
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _tensors(weights: SourceWeights, family: GgufFamily, gguf_type: str) -> Iterator[tuple[str, np.ndarray, str, bool]]:
    gguf = library()
    architecture = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    names = gguf.get_tensor_name_map(architecture, weights.config.num_hidden_layers)
    for name in weights.state:
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise CompressionError(
                f"{name} has no place in GGUF's {family.architecture}; the model cannot be exported."
            )
        kind, data = weights.block_type(name, gguf_type), weights.data(name, gguf_type)
        heads = _heads(name, weights.config) if family.is_permuted else None
        if heads:
            data = data[pair_order(len(data), heads)]
        if family.norm_offset and name.endswith("norm.weight"):
            data = data + np.float32(family.norm_offset)
        yield place, data, kind, name in weights.codes and fits(weights.codes[name], kind)
    if weights.config.rope_parameters.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _rope_factors(weights), "f32", False


def _rope_factors(weights: SourceWeights) -> np.ndarray:
    """What Llama 3 divides each frequency of the rotation by."""
    frequencies = weights.model.model.rotary_emb.inv_freq.double()
    size = 2 * len(frequencies)
    plain = weights.config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    return (plain / frequencies).float().numpy()


def _heads(name: str, config: Any) -> int | None:
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else None


def pair_order(rows: int, heads: int) -> np.ndarray:
    """Row numbers that bring element j and its partner j + H / 2 of each head side by side."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
