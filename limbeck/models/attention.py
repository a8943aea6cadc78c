"""Packed attention for any backend: sequences behind one another in one row, each attending to itself only.

Registered with transformers under the name `limbeck_packed`. The sequences' lengths travel as a keyword argument of
the model's forward, and every sequence gets its own causal scaled-dot-product call, so no mask of T x T is built and
no product is spent between sequences. That is exact on every device; on CPU it is also the fastest form, because
torch's fused kernel skips the upper triangle only when it is given no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from limbeck.errors import ModelError

PACKED_ATTENTION = "limbeck_packed"


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
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of the packed sequences.

    Args:
      module: the attention layer, unused.
      query: [1 N T H]; key and value: [1 N_kv T H], N a multiple of N_kv.
      attention_mask: None; isolation comes from the lengths.
      scaling: factor of the products; 1 / sqrt(H) when None.
      dropout: probability.
      sequence_lengths: lengths that add up to T; one sequence of T tokens when None.
      sliding_window: refused when it would bite, since a cut window is not implemented here.
    Returns: [1 T N H] and no attention weights.
    """
    lengths = [query.shape[2]] if sequence_lengths is None else list(sequence_lengths)
    if sliding_window is not None and max(lengths) > sliding_window:
        raise ModelError(
            f"packed attention: a sequence of {max(lengths)} tokens is longer than the model's sliding window "
            f"({sliding_window}); set layout padded."
        )
    outputs = [
        nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
