"""One decoding step of a Llama-type model in few calls: the twin of `lean` for sampling over a key-value cache.

Same mathematics as transformers' own forward for one new token a row. With small models and batches, a step is bound by
the number of calls and not by the products; here a layer takes about twenty, and no mask is built where none is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from limbeck.models.lean import _attention_linears, _epsilon, _feed_forward_linears, _rotate_, _unit


def next_logits(model: Any, input_ids: Tensor, padding: Tensor, cache: Cache) -> Tensor:
    """Logits [R V] behind one new token a row; the cache grows by its column.

    Args:
      model: a causal LM whose backbone `lean.can_run`.
      input_ids: int64 [R 1].
      padding: int64 [R], columns at the left of the cache that are padding.
      cache: right-aligned keys and values of what each row has seen.
    """
    backbone, columns = model.model, cache.get_seq_length() + 1
    hidden = nn.functional.embedding(input_ids[:, 0], backbone.embed_tokens.weight)
    cos, sin = (
        table[0, :, None, : table.shape[-1] // 2]
        for table in backbone.rotary_emb(hidden[None], position_ids=(columns - 1 - padding)[None])
    )
    mask = _mask(padding, columns, hidden.dtype)
    for number, layer in enumerate(backbone.layers):
        norm = layer.input_layernorm
        normed = _unit(hidden, _epsilon(norm))[0].mul_(norm.weight)
        query, key, value = _projections(normed, layer, cos, sin)
        keys, values = cache.update(key[:, :, None], value[:, :, None], number)
        attended = nn.functional.scaled_dot_product_attention(
            query[:, :, None],
            keys,
            values,
            attn_mask=mask,
            scale=layer.self_attn.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        hidden = torch.addmm(hidden, attended.reshape(len(hidden), -1), layer.self_attn.o_proj.weight.T)
        norm = layer.post_attention_layernorm
        normed = _unit(hidden, _epsilon(norm))[0].mul_(norm.weight)
        gate, up, _ = _feed_forward_linears(layer)
        gated = nn.functional.silu(_product(normed, gate), inplace=True).mul_(_product(normed, up))
        hidden = torch.addmm(hidden, gated, layer.mlp.down_proj.weight.T)
    return model.lm_head(_unit(hidden, _epsilon(backbone.norm))[0].mul_(backbone.norm.weight))


def _projections(normed: Tensor, layer: Any, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value [R N H]; the first two side by side in memory, so that one pass rotates both."""
    linears: tuple[Any, ...] = _attention_linears(layer)[:3]
    widths = [linear.out_features for linear in linears]
    joint = normed.new_empty(len(normed), sum(widths))
    for part, linear in zip(joint.split(widths, 1), linears, strict=True):
        torch.mm(normed, linear.weight.T, out=part)
    query, key, value = (part.unflatten(1, (-1, 2 * cos.shape[-1])) for part in joint.split(widths, 1))
    _rotate_(joint[:, : widths[0] + widths[1]].unflatten(1, (-1, 2 * cos.shape[-1])), cos, sin)
    return query, key, value


def _product(x: Tensor, linear: Any) -> Tensor:
    return torch.mm(x, linear.weight.T)


def _mask(padding: Tensor, columns: int, dtype: torch.dtype) -> Tensor | None:
    """[R 1 1 columns], 0 or -inf, made once for all layers; None where nothing is padded."""
    if not bool(padding.any()):
        return None
    hidden = torch.arange(columns, device=padding.device) < padding[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=padding.device).masked_fill_(hidden, -torch.inf)[:, None, None]
