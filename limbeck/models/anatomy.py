"""Where a causal language model keeps its parts: the backbone, the head, and the sizes that decide its cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from limbeck.errors import ModelError
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.models.lean import can_run, packed_rows, plan_packed

SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Config fields that say the logits are more than a product with the head."""
_FIRST_PRODUCTS = re.compile(r"layers\.0\.self_attn\.(q|k|v|qkv)_proj(\.base_layer|\.lora_A\.\w+)?$")
"""Names of the linear layers that read the embeddings directly."""
_BEHIND_ATTENTION = r"layers\.{}\.(?:self_attn\.o_proj|mlp\.\w+)$"
_LAST_PRODUCT = re.compile(r"down_proj(\.lora_B\.\w+)?$")
"""Names of the linear layers that end a decoder layer."""


class Head(NamedTuple):
    """The output projection: logits = hidden @ weight.T (+ bias)."""

    weight: Tensor
    """[V D]."""
    bias: Tensor | None
    """[V]."""


class Computed(NamedTuple):
    """What a forward pass went through; less than the batch where tokens can be left out."""

    tokens: int
    """Tokens in the linear layers."""
    last_tokens: int
    """Tokens behind the attention of the last layer."""
    attention_pairs: int
    """Pairs of query token and key token in attention, masked ones included."""

    @classmethod
    def whole(cls, lengths: Sequence[int]) -> Computed:
        """Everything, for sequences of `lengths` tokens (padding included where there is any)."""
        return cls(sum(lengths), sum(lengths), sum(n * n for n in lengths))


class Sizes(NamedTuple):
    """What a forward and a backward pass multiply, a token."""

    linear_weights: int
    """Weights of the backbone's linear layers."""
    trainable_linear_weights: int
    """Those of them that need a gradient."""
    input_gradient_weights: int
    """Those of them whose input needs a gradient: all but the first products over frozen embeddings."""
    recomputed_linear_weights: int
    """Those of them that a backward pass with gradient checkpointing multiplies again; 0 without."""
    attention_width: int
    """Layers x query heads x head size."""
    last_layer_weights: int
    """Weights of the last layer behind its attention, which only positions that are read need to pass."""
    hidden_size: int
    """D."""
    vocab_size: int
    """V, the rows of the head that are used."""
    num_parameters: int
    """All parameters, shared ones once."""
    is_head_trainable: bool
    """Whether the head needs a gradient."""


def causal_lm_of(model: Any) -> Any:
    """The transformers model inside, below a LoRA wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(model: nn.Module) -> nn.Module:
    """The part that turns token ids into last hidden states."""
    lm = causal_lm_of(model)
    backbone = getattr(lm, "model", None)
    if backbone is None or not hasattr(lm, "lm_head"):
        raise ModelError(
            f"{type(lm).__name__} has no backbone `model` and head `lm_head`; supported are Llama-type models "
            "(Llama, Mistral, Qwen2, Qwen3, SmolLM2 ...)."
        )
    return backbone


def head_of(model: nn.Module) -> Head:
    """The output projection.

    Raises: ModelError when the model does more to its logits than multiply and add.
    """
    lm = causal_lm_of(model)
    backbone_of(model)
    for field in SOFTCAP_FIELDS:
        if getattr(lm.config, field, None) not in (None, 1, 1.0):
            raise ModelError(
                f"{type(lm).__name__} changes its logits ({field} is set); only a plain head is supported."
            )
    return Head(lm.lm_head.weight, getattr(lm.lm_head, "bias", None))


def hidden_states(
    model: nn.Module, input_ids: Tensor, positions: Tensor, sequence_lengths: Sequence[int] | None = None
) -> Tensor:
    """Last hidden states [B T D] of a batch.

    Args:
      model: a causal LM; packed batches need it loaded with the packed attention.
      input_ids: int64 [B T].
      positions: int64 [B T], restarting with every sequence.
      sequence_lengths: lengths of the packed sequences of the one row; None for a right-padded batch.
    """
    extra: dict[str, Any] = {}
    if sequence_lengths is not None:
        if causal_lm_of(model).config._attn_implementation != PACKED_ATTENTION:
            raise ModelError("packed batches need the packed attention; load the model with layout packed.")
        extra["sequence_lengths"] = tuple(sequence_lengths)
    return backbone_of(model)(input_ids=input_ids, position_ids=positions, use_cache=False, **extra).last_hidden_state


def hidden_rows(
    model: nn.Module,
    input_ids: Tensor,
    positions: Tensor,
    rows: Tensor,
    sequence_lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Computed]:
    """Last hidden states [N D] at N positions of a batch, and what was computed for them.

    Args:
      rows: int64 [N], increasing flat indices into [B T]; the other arguments as for `hidden_states`.
    """
    if sequence_lengths is not None and can_run(backbone_of(model)):
        plan = plan_packed(input_ids[0], sequence_lengths, rows)
        hidden = packed_rows(backbone_of(model), input_ids[0], positions[0], plan)
        return hidden, Computed(len(plan.kept), len(rows), plan.attention_pairs)
    hidden = hidden_states(model, input_ids, positions, sequence_lengths).flatten(0, 1)[rows]
    width = input_ids.shape[1]
    return hidden, Computed.whole([width] * len(input_ids) if sequence_lengths is None else sequence_lengths)


def sizes_of(model: nn.Module, vocab_size: int | None = None) -> Sizes:
    """The sizes that the FLOP formulas of the ledger read.

    Args:
      model: a causal LM, trainable parameters marked and checkpointing switched on where it will be.
      vocab_size: the tokenizer's real vocabulary where the head has padding rows beyond it.
    """
    backbone, head = backbone_of(model), head_of(model)
    config: Any = causal_lm_of(model).config
    linear = _linear_weights(backbone)
    whole, last = _count(linear), re.compile(_BEHIND_ATTENTION.format(config.num_hidden_layers - 1))
    is_recomputed = any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Sizes(
        linear_weights=whole,
        trainable_linear_weights=_count({name: w for name, w in linear.items() if w.requires_grad}),
        input_gradient_weights=whole - (0 if _trains_embeddings(backbone) else _count(linear, _FIRST_PRODUCTS)),
        # Nothing is saved behind the last product of a layer, so recomputation stops short of it.
        recomputed_linear_weights=whole - _count(linear, _LAST_PRODUCT) if is_recomputed else 0,
        attention_width=config.num_hidden_layers * config.num_attention_heads * head_size,
        last_layer_weights=_count(linear, last),
        hidden_size=config.hidden_size,
        vocab_size=min(vocab_size or len(head.weight), len(head.weight)),
        num_parameters=sum({id(p): p.numel() for p in model.parameters()}.values()),
        is_head_trainable=head.weight.requires_grad,
    )


def _linear_weights(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: module.weight for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}


def _count(linear: Mapping[str, Tensor], pattern: re.Pattern[str] = re.compile("")) -> int:
    """Weights of the linear layers whose name has `pattern`."""
    return sum(weight.numel() for name, weight in linear.items() if pattern.search(name))


def _trains_embeddings(backbone: nn.Module) -> bool:
    embeddings = [module for module in backbone.modules() if isinstance(module, nn.Embedding)]
    return any(parameter.requires_grad for module in embeddings for parameter in module.parameters())
