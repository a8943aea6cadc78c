"""Weights of the lean decoder: those of a transformers model, with products over the same input together.

Any model whose layers are laid out as those of Llama, with the norms of Qwen3 and Gemma 3. Int8 layers of a W8A8
checkpoint are taken as they are stored.
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
from limbeck.models.load import locate, quantization_at
from limbeck.models.parts import LogitForm, causal_lm_of, decoder_of, output_layer_of, text_config
from limbeck.models.probe import ask
from limbeck.models.quantized import QuantizedLayer, RoundedLinear, read_tensors, split_tensors

MOVING_ROPES = {"dynamic", "longrope"}
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


@dataclass(frozen=True, slots=True, eq=False)
class SideBySide:
    """Layers over one input, their outputs side by side; their weights stay where they are."""

    parts: Sequence[DenseLinear]

    def __call__(self, x: Tensor) -> Tensor:
        outputs = [len(part.weight) for part in self.parts]
        found = x.new_empty(len(x), sum(outputs))
        for part, out in zip(self.parts, found.split(outputs, 1), strict=True):
            if part.bias is None:
                torch.mm(x, part.weight.T, out=out)
            else:
                torch.addmm(part.bias, x, part.weight.T, out=out)
        return found


class LayerWeights(NamedTuple):
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
    inner: int
    """F."""
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
    blocks: list[LayerWeights]
    ropes: list[tuple[Tensor, Tensor]]
    """Cosines and sines [positions 1 H/2]."""
    activation: nn.Module
    norm: Tensor
    head: Tensor
    """[V D]."""
    head_bias: Tensor | None
    softcap: float | None
    """c of logits c tanh(logits / c)."""


def stored_layers(name: str) -> Mapping[str, QuantizedLayer]:
    """The quantised layers of a directory as they are stored; none of a dense one, or of one with a cache in 8 bits,
    which transformers runs."""
    quantization = quantization_at(name)
    if quantization is None or quantization.kv_cache:
        return {}
    return split_tensors(read_tensors(Path(locate(name).path)), quantization)[0]


def unreadable(model: Any) -> str | None:
    """Why weights cannot be read where they are; None where they can, if the rest is laid out as here."""
    lm = causal_lm_of(model)
    kind = type(lm).__name__
    moving = {str(form.get("rope_type")) for form in _rope_forms(text_config(lm.config))} & MOVING_ROPES
    if moving:
        return f"{kind}: its rotation ({min(moving)}) depends on the text's length, so that prefixes cannot be shared"
    if any(module._forward_pre_hooks for module in lm.modules()):
        return f"{kind}: something changes what enters its modules, such as a rounded cache"
    others = {type(module).__name__ for module in lm.modules() if _is_other_layer(module)}
    if others:
        return f"{kind} has layers of the class {', '.join(sorted(others))}"
    weights = {(weight.dtype, weight.device.type, hasattr(weight, "placements")) for weight in lm.parameters()}
    if len(weights) > 1 or next(iter(weights))[2]:
        return f"{kind}: its weights are in parts, or of several types"
    return None


def _is_other_layer(module: nn.Module) -> bool:
    """Whether a module does more to its input than a product with a weight."""
    is_special = isinstance(module, nn.Linear) and type(module) not in (nn.Linear, RoundedLinear)
    return is_special or hasattr(module, "base_layer")


def _rope_forms(config: Any) -> list[Mapping[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return [part for part in parameters.values() if isinstance(part, Mapping)] or [parameters]


def weights_of(
    model: Any,
    precision: Precision = "float32",
    max_tokens: int = 32768,
    stored: Mapping[str, QuantizedLayer] | None = None,
    form: LogitForm | None = None,
) -> Weights:
    """Weights of a transformers model in memory, which are read where they are.

    Args:
      precision: float32, int8 (every linear layer but the head), or auto: int8 for what is stored so.
      max_tokens: longest prompt; the model's own limit where that is less.
      stored: the quantised layers of its file.
      form: what the model does to its logits; it is asked when None.
    Raises: ModelError for a model whose weights are not readable; AttributeError for one that is laid out otherwise.
    """
    reason = unreadable(model)
    if reason is not None:
        raise ModelError(f"{reason}; the lean decoder does not read it.")
    lm = causal_lm_of(model)
    config, backbone, head, form = text_config(lm.config), decoder_of(lm), output_layer_of(lm), form or ask(lm).form
    source = _Source(precision, stored or {}, 1.0 if "Gemma" in type(backbone.norm).__name__ else 0.0)
    types = list(getattr(backbone.rotary_emb, "layer_types", None) or [None])
    limit = min(max_tokens, config.max_position_embeddings)
    with torch.inference_mode():
        return Weights(
            config=config,
            embed=backbone.embed_tokens,
            blocks=[source.block(layer, number, types) for number, layer in enumerate(backbone.layers)],
            ropes=[_rope_table(backbone.rotary_emb, layer_type, limit) for layer_type in types],
            activation=backbone.layers[0].mlp.act_fn,
            norm=source.norm(backbone.norm) * form.scale(config),
            head=head.weight.detach(),
            head_bias=None if getattr(head, "bias", None) is None else head.bias.detach(),
            softcap=form.softcap(config),
        )


class _Source(NamedTuple):
    """What turns a layer of transformers into a block."""

    precision: Precision
    stored: Mapping[str, QuantizedLayer]
    norm_offset: float

    def block(self, layer: Any, number: int, types: Sequence[str | None]) -> LayerWeights:
        attention, mlp, name = layer.self_attn, layer.mlp, f"model.layers.{number}"
        # Gemma 3 has a norm on both sides of each half; the others call the second half's norm by another name.
        is_double = hasattr(layer, "pre_feedforward_layernorm")
        return LayerWeights(
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
            inner=mlp.down_proj.in_features,
            scale=attention.scaling,
            window=self._window(attention),
            rope=types.index(attention.layer_type) if types != [None] else 0,
        )

    def norm(self, module: Any) -> Any:
        """Its factor [D]; None for None."""
        return None if module is None else module.weight.detach() + self.norm_offset

    @staticmethod
    def _window(attention: Any) -> int | None:
        # Mistral's layers leave it to their config; others that have it there may not use it.
        if type(attention).__name__.startswith("Mistral"):
            return getattr(attention.config, "sliding_window", None)
        return getattr(attention, "sliding_window", None)

    def linear(self, prefix: str, parent: Any, names: Sequence[str]) -> Linear:
        """Layers over one input as one product."""
        modules: list[Any] = [getattr(parent, name) for name in names]
        where = f"{prefix}.{names[0]}"
        codes = self._int8_codes([f"{prefix}.{name}" for name in names])
        if len(codes) == len(names):
            return Int8Linear.joined(codes, _joined_bias(modules), where)
        if any(isinstance(module, RoundedLinear) for module in modules):
            return _apart(modules)
        if self.precision == "int8":
            weight = torch.cat([module.weight.detach() for module in modules])
            return Int8Linear.rounded(weight, _joined_bias(modules), where)
        parts = [DenseLinear(m.weight.detach(), None if m.bias is None else m.bias.detach()) for m in modules]
        return parts[0] if len(parts) == 1 else SideBySide(parts)

    def _int8_codes(self, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Codes and scales of those layers that are stored in 8 bits."""
        layers = [self.stored[name].stored for name in names if name in self.stored]
        return [(layer.codes, layer.scales[:, 0].float()) for layer in layers if layer.scheme.format == "int-quantized"]


def _apart(modules: Sequence[nn.Module]) -> Linear:
    """Layers whose inputs are rounded in a way that only their own module knows."""

    def products(x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in modules], 1)

    return products


def _joined_bias(modules: Sequence[Any]) -> Tensor | None:
    if all(module.bias is None for module in modules):
        return None
    return torch.cat([torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float() for m in modules])


def _rope_table(rotary: Any, layer_type: str | None, limit: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, made once, so that a position has one pair of them for good."""
    extra = {} if layer_type is None else {"layer_type": layer_type}
    device = rotary.inv_freq.device if layer_type is None else getattr(rotary, f"{layer_type}_inv_freq").device
    like, positions = torch.zeros(1, 1, 1, device=device), torch.arange(limit, device=device)
    tables = rotary(like, position_ids=positions[None], **extra)
    cos, sin = (table[0, :, None, : table.shape[-1] // 2].contiguous() for table in tables)
    return cos, sin
