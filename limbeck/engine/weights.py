"""Weights of the lean decoder: those of a transformers model, with products over the same input fused.

Llama, Mistral, Qwen2, Qwen3, Gemma and Gemma 3 (text). Int8 layers of a W8A8 checkpoint are taken as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.engine.int8 import Int8Linear
from limbeck.errors import ModelError
from limbeck.models.load import load_model, locate, quantization_at
from limbeck.models.quantized import Layer, RoundedLinear, read_tensors, split_tensors

KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3")
MOVING_ROPES = ("dynamic", "longrope")
"""Rotations that depend on the length of the prompt, so that no prefix can be shared."""

Precision = Literal["auto", "float32", "int8"]
Linear = Callable[[Tensor], Tensor]
"""[U I] -> [U O]."""


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    """y = x weight^T + bias, a BLAS product."""

    weight: Tensor
    """[O I]."""
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Block(NamedTuple):
    """One decoder layer."""

    attention_norm: Tensor
    """[D]; Gemma's 1 is added."""
    qkv: Linear
    query_norm: Tensor | None
    """[H], of Qwen3 and Gemma 3."""
    key_norm: Tensor | None
    output: Linear
    attention_out_norm: Tensor | None
    """[D], of Gemma 3: on the result, before it is added."""
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    mlp_out_norm: Tensor | None
    scale: float
    """Factor of attention's products."""
    window: int | None
    """Keys that a token sees, its own included; None for all."""
    rope: int
    """Which of the tables."""


class Weights(NamedTuple):
    """A whole model."""

    config: Any
    embed: nn.Embedding
    """int64 [U] -> [U D], scaled where the model does."""
    blocks: list[Block]
    ropes: list[tuple[Tensor, Tensor]]
    """Cosines and sines [positions 1 H/2]."""
    activation: nn.Module
    norm: Tensor
    head: Tensor
    """[V D]."""
    head_bias: Tensor | None
    softcap: float | None
    """c of logits c tanh(logits / c)."""


def read_weights(name: str, precision: Precision, max_tokens: int) -> Weights:
    """Weights of a directory, alias or hub id; dense, or written by `limbeck quantize`.

    Args:
      precision: float32, int8 (every linear layer but the head), or auto: int8 for what is stored so.
      max_tokens: longest prompt; the model's own limit where that is less.
    Raises: ModelError for an unsupported kind of model or scheme.
    """
    quantization = quantization_at(name)
    stored: Mapping[str, Layer] = {}
    if quantization is not None and precision != "float32":
        if quantization.kv_cache:
            raise ModelError(f"{name}: keys and values in 8 bits are not served; export without kv_cache_scheme.")
        stored = split_tensors(read_tensors(Path(locate(name).path)), quantization)[0]
    return weights_of(load_model(name), precision, max_tokens, stored)


def weights_of(
    model: Any, precision: Precision = "float32", max_tokens: int = 32768, stored: Mapping[str, Layer] | None = None
) -> Weights:
    """Weights of a transformers model in memory; `stored` are the quantised layers of its file."""
    config = model.config
    kind = type(model).__name__.removesuffix("ForCausalLM")
    if kind not in KINDS:
        raise ModelError(f"{type(model).__name__} is not served; supported are {', '.join(KINDS)}.")
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError(f"{type(model).__name__}: its attention looks ahead; only causal models are served.")
    backbone = model.model
    source = _Source(precision, stored or {}, 1.0 if kind.startswith("Gemma") else 0.0, kind)
    types = list(getattr(backbone.rotary_emb, "layer_types", None) or [None])
    limit = min(max_tokens, config.max_position_embeddings)
    with torch.inference_mode():
        return Weights(
            config=config,
            embed=backbone.embed_tokens,
            blocks=[source.block(layer, number, types) for number, layer in enumerate(backbone.layers)],
            ropes=[_rope_table(backbone.rotary_emb, config, layer_type, limit) for layer_type in types],
            activation=backbone.layers[0].mlp.act_fn,
            norm=source.norm(backbone.norm),
            head=model.lm_head.weight.detach(),
            head_bias=None if model.lm_head.bias is None else model.lm_head.bias.detach(),
            softcap=getattr(config, "final_logit_softcapping", None),
        )


class _Source(NamedTuple):
    """What turns a layer of transformers into a block."""

    precision: Precision
    stored: Mapping[str, Layer]
    norm_offset: float
    kind: str

    def block(self, layer: Any, number: int, types: Sequence[str | None]) -> Block:
        attention, mlp, name = layer.self_attn, layer.mlp, f"model.layers.{number}"
        # Gemma 3 has a norm on both sides of each half; the others call the second half's norm by another name.
        is_double = hasattr(layer, "pre_feedforward_layernorm")
        return Block(
            attention_norm=self.norm(layer.input_layernorm),
            qkv=self.linear(f"{name}.self_attn", attention, ("q_proj", "k_proj", "v_proj")),
            query_norm=self.norm(getattr(attention, "q_norm", None)),
            key_norm=self.norm(getattr(attention, "k_norm", None)),
            output=self.linear(f"{name}.self_attn", attention, ("o_proj",)),
            attention_out_norm=self.norm(layer.post_attention_layernorm) if is_double else None,
            mlp_norm=self.norm(layer.pre_feedforward_layernorm if is_double else layer.post_attention_layernorm),
            gate_up=self.linear(f"{name}.mlp", mlp, ("gate_proj", "up_proj")),
            down=self.linear(f"{name}.mlp", mlp, ("down_proj",)),
            mlp_out_norm=self.norm(layer.post_feedforward_layernorm) if is_double else None,
            scale=attention.scaling,
            window=self._window(attention),
            rope=types.index(attention.layer_type) if types != [None] else 0,
        )

    def norm(self, module: Any) -> Any:
        """Its factor [D]; None for None."""
        return None if module is None else module.weight.detach() + self.norm_offset

    def _window(self, attention: Any) -> int | None:
        if self.kind == "Mistral":
            return getattr(attention.config, "sliding_window", None)
        return getattr(attention, "sliding_window", None)

    def linear(self, prefix: str, parent: Any, names: Sequence[str]) -> Linear:
        """Layers over one input as one product."""
        modules: list[Any] = [getattr(parent, name) for name in names]
        layers = [self.stored.get(f"{prefix}.{name}") for name in names]
        bias = _joined_bias(modules)
        where = f"{prefix}.{names[0]}"
        parts = [
            (layer.stored.codes, layer.stored.scales[:, 0].float())
            for layer in layers
            if layer is not None and layer.stored.scheme.format == "int-quantized"
        ]
        if len(parts) == len(names):
            return Int8Linear.joined(parts, bias, where)
        if any(isinstance(module, RoundedLinear) for module in modules):
            return _apart(modules)
        weight = torch.cat([module.weight.detach() for module in modules])
        if self.precision == "int8":
            return Int8Linear.rounded(weight, bias, where)
        return DenseLinear(weight, bias)


def _apart(modules: Sequence[nn.Module]) -> Linear:
    """Layers whose inputs are rounded in a way that only their own module knows."""

    def products(x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in modules], 1)

    return products


def _joined_bias(modules: Sequence[Any]) -> Tensor | None:
    if all(module.bias is None for module in modules):
        return None
    return torch.cat([torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float() for m in modules])


def _rope_table(rotary: Any, config: Any, layer_type: str | None, limit: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, made once, so that a position has one pair of them for good."""
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    if parameters.get("rope_type") in MOVING_ROPES:
        raise ModelError(
            f"rope_type {parameters['rope_type']!r} depends on the prompt's length, so that prefixes cannot be shared; "
            "it is not served."
        )
    extra = {} if layer_type is None else {"layer_type": layer_type}
    tables = rotary(torch.zeros(1, 1, 1), position_ids=torch.arange(limit)[None], **extra)
    cos, sin = (table[0, :, None, : table.shape[-1] // 2].contiguous() for table in tables)
    return cos, sin
