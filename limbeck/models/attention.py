"""Packed attention for any backend: sequences behind one another in one row, each attending to itself only.

Registered with transformers under the name `limbeck_packed`. The sequences' lengths travel as a keyword argument of
the model's forward, and every sequence gets its own causal scaled-dot-product call, so no mask of T x T is built and
no product is spent between sequences. That is exact on every device; on CPU it is also the fastest form, because
torch's fused kernel skips the upper triangle only when it is given no mask.

A window, a soft cap and sinks are honoured; a keyword that asks for anything else is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from limbeck.errors import ModelError
from limbeck.models import varlen

PACKED_ATTENTION = "limbeck_packed"
CARRIED = {
    *("position_ids", "position_embeddings", "use_cache", "layer_idx", "output_router_logits", "eps", "dim"),
    *("cu_seq_lens_k", "max_length_k", "seq_idx"),
    *("inputs_embeds", "past_key_values", "cache_position", "logits_to_keep", "return_dict", "token_type_ids"),
}
"""Keywords that pass through every layer of a model and ask nothing of its attention."""


class _Form(NamedTuple):
    """What an attention does beside causal softmax."""

    scale: float | None
    dropout: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    """[N], a logit of each head that takes probability and gives no value."""

    @property
    def is_plain(self) -> bool:
        """Whether a scale and a window are all that is asked for."""
        return not self.dropout and self.softcap is None and self.sinks is None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequence_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of the packed sequences.

    Args:
      module: the attention layer, whose `is_causal` is read where the call does not say.
      query: [B N T H]; key and value: [B N_kv T H], N a multiple of N_kv; B is 1 where there are lengths.
      attention_mask: None; isolation comes from the lengths.
      scaling: factor of the products; 1 / sqrt(H) when None.
      dropout: probability.
      sequence_lengths: lengths that add up to T; every row one sequence of T tokens when None.
      sliding_window: keys that a query sees, its own among them; all before it when None.
      softcap: c of logits c tanh(logits / c).
      cu_seq_lens_q, max_length_q: the lengths as a kernel reads them (`varlen.Cuts`), where it is to take all at once.
      s_aux, sinks: [N], logits of the heads' sinks (arXiv 2508.10925 calls them so), under either name.
    Returns: [B T N H] and no attention weights.
    Raises: ModelError for a mask, an attention that looks ahead, or a keyword that is not honoured here.
    """
    asked = {name for name, given in others.items() if given is not None and given is not False} - CARRIED
    if attention_mask is not None:
        asked.add("attention_mask")
    if output_attentions:
        asked.add("output_attentions")
    if not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        asked.add("is_causal=False")
    if asked:
        raise ModelError(
            f"packed attention: {type(module).__name__} asks for {', '.join(sorted(asked))}, which it does not honour."
        )
    form = _Form(scaling, dropout, sliding_window, softcap, s_aux if s_aux is not None else sinks)
    device = query.device.type
    if cu_seq_lens_q is not None and torch.is_autocast_enabled(device):
        # Rotary embedding leaves float32; rounded here once, and not a sequence at a time.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if cu_seq_lens_q is not None and form.is_plain and query.shape[0] == 1 and varlen.is_there(query):
        assert max_length_q is not None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        cuts = varlen.Cuts(cu_seq_lens_q, max_length_q)
        return varlen.attend(q, k, v, cuts, scaling, sliding_window)[None], None
    lengths = [query.shape[2]] if sequence_lengths is None else list(sequence_lengths)
    outputs = [
        _attend(q, k, v, form)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, form: _Form) -> Tensor:
    """One sequence a row: [B N T H]; torch's fused kernel where it computes all that is asked."""
    length = query.shape[2]
    window = form.window if form.window is not None and form.window < length else None
    if form.softcap is not None or form.sinks is not None:
        return _attend_explicitly(query, key, value, form._replace(window=window))
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if window is None else _visible(length, window, query.device),
        dropout_p=form.dropout,
        is_causal=window is None,
        scale=form.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_explicitly(query: Tensor, key: Tensor, value: Tensor, form: _Form) -> Tensor:
    """The same written out, with soft cap and sinks."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if form.scale is None else form.scale
    logits = query @ key.transpose(2, 3) * scale
    if form.softcap is not None:
        logits = torch.tanh(logits / form.softcap) * form.softcap
    logits = logits.masked_fill(~_visible(query.shape[2], form.window, query.device), -torch.inf)
    if form.sinks is not None:
        sinks = form.sinks.to(logits.dtype).reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    return nn.functional.dropout(weights, form.dropout) @ value


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [T T]: the keys that each query sees."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
