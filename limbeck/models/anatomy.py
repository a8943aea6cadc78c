"""Where a causal language model keeps its parts: the backbone, the head, and the sizes that decide its cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from limbeck.errors import ModelError
from limbeck.models import layouts, lean_device
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.models.lean import can_run, packed_rows, plan_packed
from limbeck.models.lean_device import DevicePlan
from limbeck.models.parts import Head as Head
from limbeck.models.parts import causal_lm_of as causal_lm_of
from limbeck.models.parts import decoder_of, output_layer_of, text_config
from limbeck.models.probe import ProbeResult, ask, logit_scale
from limbeck.models.probe import head_of as head_of
from limbeck.models.varlen import Cuts

_FIRST_PRODUCTS = re.compile(r"layers\.0\.self_attn\.(q|k|v|qkv)_proj(\.base_layer|\.lora_A\.\w+)?$")
"""Names of the linear layers that read the embeddings directly."""
_BEHIND_ATTENTION = r"layers\.{}\.(?:self_attn\.o_proj|mlp\.\w+)$"
_LAST_PRODUCT = re.compile(r"down_proj(\.lora_B\.\w+)?$")
"""Names of the linear layers that end a decoder layer."""


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


class Given(NamedTuple):
    """What whoever laid out a packed batch knows of it, for a model on an accelerator."""

    cuts: Cuts | None = None
    plan: DevicePlan | None = None
    """For the rows that are asked for."""


NOTHING_GIVEN = Given()


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


def context_tokens(model: Any) -> int:
    """Tokens of the longest sequence that a model's positions allow; 2^31 for one without a limit."""
    return getattr(text_config(causal_lm_of(model).config), "max_position_embeddings", None) or 2**31


def backbone_of(model: nn.Module) -> nn.Module:
    """The decoder of a Llama-type model, whose layers are a list behind embeddings, for what goes through them.

    Raises: ModelError for a model that is laid out otherwise.
    """
    lm = causal_lm_of(model)
    backbone: Any = getattr(lm, "model", None)
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    if not hasattr(lm, "lm_head") or not all(hasattr(backbone, part) for part in parts):
        raise ModelError(
            f"{type(lm).__name__} has no backbone `model` of {', '.join(parts)} and a head `lm_head`; only Llama-type "
            "models are supported here (Llama, Mistral, Qwen2, Qwen3, SmolLM2 ...)."
        )
    return backbone


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    positions: Tensor,
    sequence_lengths: Sequence[int] | None = None,
    cuts: Cuts | None = None,
) -> Tensor:
    """Last hidden states [B T D] of a batch, times the factor that the model's logits have.

    Args:
      model: a causal LM.
      input_ids: int64 [B T].
      positions: int64 [B T], restarting with every sequence.
      sequence_lengths: lengths of the packed sequences of the one row, which are run in the fastest layout that is
        right for the model; None for rows of one length, and for right-padded ones of a model that `pads`.
      cuts: the same lengths where the model is; made here for an accelerator when None.
    """
    decoder = decoder_of(model)
    if sequence_lengths is not None:
        if cuts is None and input_ids.is_cuda:
            cuts = Cuts.of(sequence_lengths, input_ids.device)
        hidden = layouts.run(decoder, input_ids, sequence_lengths, _way(model, ask(model)), positions, cuts)
    else:
        hidden = layouts.call(decoder, input_ids, positions)
    scale = logit_scale(model)
    return hidden if scale == 1.0 else hidden * scale


def _way(model: nn.Module, verdict: ProbeResult) -> layouts.Way:
    """Packed only with the attention that keeps sequences apart: a model that reads masks is padded instead."""
    if verdict.way == "packed" and causal_lm_of(model).config._attn_implementation != PACKED_ATTENTION:
        return "padded" if verdict.pads else "alone"
    return verdict.way


def hidden_rows(
    model: nn.Module,
    input_ids: Tensor,
    positions: Tensor,
    rows: Tensor,
    sequence_lengths: Sequence[int] | None = None,
    given: Given = NOTHING_GIVEN,
) -> tuple[Tensor, Computed]:
    """Last hidden states [N D] at N positions of a batch, and what was computed for them.

    Args:
      rows: int64 [N], increasing flat indices into [B T]; the other arguments as for `hidden_states`.
      given: what is known already of the batch and of these rows.
    """
    if sequence_lengths is not None and ask(model).is_lean:
        decoder = decoder_of(model)
        if can_run(decoder):
            plan = plan_packed(input_ids[0], sequence_lengths, rows)
            hidden = packed_rows(decoder, input_ids[0], positions[0], plan)
            return hidden, Computed(len(plan.kept), len(rows), plan.attention_pairs)
        if lean_device.can_run(decoder):
            chosen = given.plan or lean_device.plan_of(input_ids[0], sequence_lengths, rows)
            hidden = lean_device.packed_rows(decoder, input_ids[0], positions[0], chosen)
            return hidden, Computed(len(chosen.plan.kept), len(rows), chosen.plan.attention_pairs)
    hidden = hidden_states(model, input_ids, positions, sequence_lengths, given.cuts).flatten(0, 1)[rows]
    width = input_ids.shape[1]
    return hidden, Computed.whole([width] * len(input_ids) if sequence_lengths is None else sequence_lengths)


def sizes_of(model: nn.Module, vocab_size: int | None = None) -> Sizes:
    """The sizes that the FLOP formulas of the ledger read.

    Args:
      model: a causal LM, trainable parameters marked and checkpointing switched on where it will be.
      vocab_size: the tokenizer's real vocabulary where the head has padding rows beyond it.
    """
    backbone, head = decoder_of(model), output_layer_of(model)
    config: Any = text_config(causal_lm_of(model).config)
    linear = _linear_weights(backbone)
    whole, last = _count(linear), re.compile(_BEHIND_ATTENTION.format(config.num_hidden_layers - 1))
    is_recomputed = any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())
    heads = getattr(config, "num_attention_heads", None) or 0
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return Sizes(
        linear_weights=whole,
        trainable_linear_weights=_count({name: w for name, w in linear.items() if w.requires_grad}),
        input_gradient_weights=whole - (0 if _trains_embeddings(backbone) else _count(linear, _FIRST_PRODUCTS)),
        # Nothing is saved behind the last product of a layer, so recomputation stops short of it.
        recomputed_linear_weights=whole - _count(linear, _LAST_PRODUCT) if is_recomputed else 0,
        attention_width=config.num_hidden_layers * heads * head_size,
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
