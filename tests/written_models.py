"""Quantised copies of small models, written tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from made_models import FAMILIES
from made_tokenizers import byte_tokenizer
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

from limbeck.compress.quantize.grid import Quantized, encode
from limbeck.compress.quantize.methods import grid_of
from limbeck.models.schemes import Scheme, config_of, tensors_of


def rounded_to(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Quantized:
    """Codes and scales of a weight, the scales as they will be stored."""
    grid = grid_of(scheme).fitted(weight)
    scales = grid.scales(weight)
    if scheme.scale_dtype is None:
        scales = scales.to(dtype).float()
    if scheme.strategy == "tensor":
        scales = scales.amax().expand_as(scales)
    return encode(weight, scales, grid)


def write_quantized(
    directory: Path,
    model: Any,
    schemes: dict[str, Scheme],
    dtype: torch.dtype = torch.float32,
    kv_scales: dict[str, Tensor] | None = None,
    input_scale: float = 0.02,
) -> dict[str, Tensor]:
    """A quantised copy of a model: named layers by their scheme, the others dense. Returns the dense twins by name."""
    tensors, dense = {}, {}
    for name, tensor in model.to(dtype).state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in schemes and name.endswith(".weight"):
            scheme = schemes[layer]
            quantized = rounded_to(tensor.float(), scheme, dtype)
            scale = input_scale if scheme.activations == "static" else None
            tensors |= tensors_of(
                layer, quantized.codes, quantized.scales, scheme, dtype, scale, quantized.grid.global_scale
            )
            dense[name] = quantized.dequantize().to(dtype)
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            tensors[name] = tensor
    tensors |= kv_scales or {}
    directory.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    kinds = set(schemes.values())
    left = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in schemes]
    tree = json.loads(model.config.to_json_string(use_diff=False)) | {
        "architectures": [type(model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": config_of(
            kinds.pop() if len(kinds) == 1 else schemes, left, kv_cache=kv_scales is not None
        ),
    }
    (directory / "config.json").write_text(json.dumps(tree))
    return dense


def linears_of(model: Any) -> list[str]:
    """The linear layers of the blocks."""
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]


def schemes_for(model: Any, scheme: Scheme) -> dict[str, Scheme]:
    """One scheme for all of them."""
    return dict.fromkeys(linears_of(model), scheme)


def save_exportable(directory: Path, family: str = "llama", **changes: Any) -> str:
    """A small random model of a family with a byte-level BPE tokenizer that llama.cpp knows, as a directory."""
    tokenizer = byte_tokenizer(merges=["Ġ t", "Ġ a", "h e", "Ġt he", "e r"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    kind, extra = FAMILIES[family]
    sizes = {
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    windows = {"sliding_window": 64} if "sliding_window" in extra else {}
    heads = {"head_dim": 32} if "head_dim" in extra else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes | extra | windows | heads | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
