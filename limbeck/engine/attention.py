"""Attention of equally long segments to the keys before them and to their own, merged by log-sum-exp.

Every segment is a product of its own, with shapes that depend on nothing but its length and the number of keys before
it. So its result has the same bits alone and beside any number of others, which a product over the rows of several
segments would not grant. The heads of a group stand behind one another as rows, so that keys are never repeated.
Source: the merge is that of FlashAttention's partial results (2205.14135).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

HIDDEN = torch.finfo(torch.float32).min
"""Added to a masked product; finite, so that a row without any visible key stays finite and gets weight 0."""
TILE_TOKENS = 1024
SMALL_TOKENS = 64
"""Masks of segments up to this length are all kept, less than 1 MB for each head of a group."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor] | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """softmax([q K_past, q K_own]) [V_past, V_own] for n segments of I tokens behind the same past.

    Args:
      query: [n I N H]; key and value: [n I N_kv H], N a multiple of N_kv.
      past: keys and values [N_kv S H] before all segments; None when S is 0.
      scale: factor of the products.
      window: how many keys a token sees, its own included; None for all.
    Returns: [n I N H].
    """
    count, length, heads, size = query.shape
    groups = heads // key.shape[2]
    stacked = query.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).reshape(count, -1, groups * length, size)
    own = (key.transpose(1, 2), value.transpose(1, 2))
    out, log_sums = _own_attention(stacked, *own, groups, scale, window)
    if past is not None:
        start = past[0].shape[1]
        low = 0 if window is None else max(0, start - window + 1)
        if low < start:
            keys, values = (states[:, low:].expand(count, -1, -1, -1) for states in past)
            mask = _past_mask(length, groups, start, low, window)
            out = _merged(*_flash(stacked, keys, values, scale, mask), out, log_sums)
    return out.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4).reshape(query.shape)


def attend_last(query: Tensor, seen: Sequence[tuple[Tensor, Tensor]], scale: float, window: int | None) -> Tensor:
    """Single tokens behind everything that they see, their own key last.

    Args:
      query: [n N H].
      seen: keys and values [1 N_kv S H] of each, S of its own.
      scale, window: as in `attend`.
    Returns: [n N H].
    """
    stacked = query.view(len(query), 1, seen[0][0].shape[1], -1, query.shape[2]).unbind(0)
    if window is not None:
        seen = [(keys[:, :, -window:], values[:, :, -window:]) for keys, values in seen]
    if _is_exact(query):
        outs = [_flash(row, keys, values, scale, None)[0] for row, (keys, values) in zip(stacked, seen, strict=True)]
        return torch.cat(outs).reshape(query.shape)
    # Elsewhere calls cost more than products: all together, padded at the end.
    lengths = torch.tensor([keys.shape[2] for keys, _ in seen], device=query.device)
    keys, values = (_padded([both[part] for both in seen]) for part in range(2))
    hidden = torch.arange(keys.shape[2], device=query.device) >= lengths[:, None]
    mask = query.new_zeros(hidden.shape).masked_fill_(hidden, torch.finfo(query.dtype).min)[:, None, None]
    return _flash(torch.cat(stacked), keys, values, scale, mask)[0].reshape(query.shape)


def _padded(states: Sequence[Tensor]) -> Tensor:
    """[1 N_kv S H] of several lengths -> [n N_kv S H], zeros behind the shorter ones."""
    _, heads, _, size = states[0].shape
    found = states[0].new_zeros(len(states), heads, max(part.shape[2] for part in states), size)
    torch._foreach_copy_(
        [row[:, : part.shape[2]] for row, part in zip(found, states, strict=True)], [p[0] for p in states]
    )
    return found


def _is_exact(query: Tensor) -> bool:
    """Whether there is the kernel that takes each segment and head apart."""
    return query.device.type == "cpu" and query.dtype == torch.float32


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs [n N_kv R H] and log-sum-exps [n N_kv R] of torch's fused kernel, which takes each (n, N_kv) apart."""
    if _is_exact(query):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, attn_mask=mask, scale=scale)
    products = (query @ key.transpose(-1, -2)).float() * scale
    if mask is not None:
        products = products + mask.to(products)
    return products.softmax(-1).to(value.dtype) @ value, products.logsumexp(-1)


def _merged(out_a: Tensor, log_sums_a: Tensor, out_b: Tensor, log_sums_b: Tensor) -> Tensor:
    """The attention over two sets of keys from that over each: weights softmax of the log-sum-exps.

    Softmax goes row by row and the rest are single IEEE operations, so that no element depends on its neighbours.
    """
    weight = torch.stack([log_sums_a, log_sums_b], -1).softmax(-1).to(out_a.dtype)
    return (out_a * weight[..., :1]).add_(out_b * weight[..., 1:])


def _own_attention(
    query: Tensor, key: Tensor, value: Tensor, groups: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """`_flash` of segments to themselves; long ones a tile of queries at a time, so that no mask is length squared."""
    length = key.shape[2]
    if length <= TILE_TOKENS:
        return _flash(query, key, value, scale, _own_mask(0, length, groups, window))
    rows = query.unflatten(2, (groups, length))
    outs, sums = [], []
    for start in range(0, length, TILE_TOKENS):
        stop = min(start + TILE_TOKENS, length)
        tile = rows[:, :, :, start:stop].flatten(2, 3)
        mask = _own_mask(start, stop, groups, window)
        out, log_sums = _flash(tile, key[:, :, :stop], value[:, :, :stop], scale, mask)
        outs.append(out.unflatten(2, (groups, -1)))
        sums.append(log_sums.unflatten(2, (groups, -1)))
    return torch.cat(outs, 3).flatten(2, 3), torch.cat(sums, 3).flatten(2, 3)


def _own_mask(start: int, stop: int, groups: int, window: int | None) -> Tensor | None:
    """[groups * (stop - start), stop], 0 where tokens from `start` on may look; None for a single one."""
    if stop == 1:
        return None
    return (_small_mask if stop <= SMALL_TOKENS else _large_mask)(start, stop, groups, window)


def _made_mask(start: int, stop: int, groups: int, window: int | None) -> Tensor:
    distance = torch.arange(start, stop)[:, None] - torch.arange(stop)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape).masked_fill_(hidden, HIDDEN).repeat(groups, 1)


_small_mask = functools.lru_cache(maxsize=SMALL_TOKENS)(_made_mask)
_large_mask = functools.lru_cache(maxsize=2)(_made_mask)
"""For the layers of a pass; more would be memory that grows with the lengths that are asked for."""


def _past_mask(length: int, groups: int, start: int, low: int, window: int | None) -> Tensor | None:
    """[groups * length, start - low]; None where every token sees every key."""
    if window is None or start + length - 1 - low < window:
        return None
    distance = torch.arange(start, start + length)[:, None] - torch.arange(low, start)
    hidden = distance >= window
    return torch.zeros(hidden.shape).masked_fill_(hidden, HIDDEN).repeat(groups, 1)
