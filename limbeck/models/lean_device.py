"""The lean forward and backward pass for an accelerator: few launches, few bytes, no waiting.

The mathematics of `lean`, whose models it takes, with three differences:

1. The residual stream is float32, products and what they read are of the type of autocast (bf16), and all that stands
   between two products is one pass over memory (`pointwise`). Weights are rounded to that type once a pass, together.
2. Attention takes all sequences in one call (`varlen`), without a shared beginning.
3. Which tokens are computed is planned on the host, beside the batch (`plan_on_host`).

A layer keeps x, q, k, v, attention's output, the sum after it, gate and up. Source of the layer: transformers' Llama.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.models import pointwise, varlen
from limbeck.models.lean import (
    PackedPlan,
    attention_linears,
    epsilon_of,
    feed_forward_linears,
    has_plain_layers,
    plan_packed,
)
from limbeck.models.varlen import Cuts


class DevicePlan(NamedTuple):
    """Which tokens of a packed row are computed, where the model is."""

    plan: PackedPlan
    cuts: Cuts
    """Of the tokens that are computed."""


def plan_on_host(input_ids: Tensor, lengths: Sequence[int], rows: Tensor) -> DevicePlan:
    """The plan for a batch that is still on the host; arguments as of `plan_packed`."""
    plan = plan_packed(input_ids, lengths, rows, shares=False)
    return DevicePlan(plan, Cuts.of(plan.lengths, input_ids.device))


def plan_of(input_ids: Tensor, lengths: Sequence[int], rows: Tensor) -> DevicePlan:
    """The plan for a batch that is on an accelerator already, which is waited for."""
    (kept, known, prefix, places), cuts = plan_on_host(input_ids.cpu(), lengths, rows.cpu())
    kept, places, starts = (x.to(input_ids.device) for x in (kept, places, cuts.starts))
    return DevicePlan(PackedPlan(kept, known, prefix, places), Cuts(starts, cuts.longest))


def can_run(backbone: nn.Module) -> bool:
    """Whether `packed_rows` computes what this backbone does: a plain Llama on an accelerator, without adapters."""
    if not has_plain_layers(backbone) or any(module._forward_pre_hooks for module in backbone.modules()):
        return False
    weights = list(backbone.parameters())
    return all(weight.is_cuda and type(weight.data) is type(weights[0].data) for weight in weights) and not any(
        hasattr(weight, "placements") for weight in weights
    )


def packed_rows(backbone: Any, input_ids: Tensor, positions: Tensor, given: DevicePlan) -> Tensor:
    """Last hidden states [N D], in the type of the weights, at the needed positions of a packed row.

    Args:
      backbone: a model that `can_run`.
      input_ids: int64 [T]; positions: int64 [T], restarting with every sequence.
      given: which tokens to compute.
    """
    plan, device = given.plan, input_ids.device.type
    weight = backbone.embed_tokens.weight
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        x: Tensor = nn.functional.embedding(input_ids[plan.kept], weight).float()
        tables = backbone.rotary_emb(x[None], position_ids=positions[plan.kept][None])
        cos, sin = (table[0, :, None, : table.shape[-1] // 2] for table in tables)
        products, added = _rounded(backbone.layers, dtype), None
        for number, layer in enumerate(backbone.layers):
            weights, low = products[number]
            norm = layer.input_layernorm
            x, query, key, value = _BeforeAttention.apply(
                x, added, norm.weight, *weights[:3], low[:3], cos, sin, epsilon_of(norm), dtype
            )
            attended = _attention(query, key, value, given.cuts, plan.lengths, layer.self_attn.scaling)
            if number == len(backbone.layers) - 1:
                x, attended = x[plan.rows], attended[plan.rows]
            norm = layer.post_attention_layernorm
            x, added = _BehindAttention.apply(x, attended, norm.weight, *weights[3:], low[3:], epsilon_of(norm))
        found: Tensor = _Norm.apply(x, added, backbone.norm.weight, epsilon_of(backbone.norm), weight.dtype)
        return found


def _rounded(layers: Any, dtype: torch.dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The weights of the products of each layer, and the same in the products' type: rounded together where they
    differ."""
    whole: list[list[Any]] = [
        [m.weight for m in (*attention_linears(layer), *feed_forward_linears(layer))] for layer in layers
    ]
    flat: list[Tensor] = [weight for weights in whole for weight in weights]
    if flat[0].dtype != dtype:
        with torch.no_grad():
            low = [torch.empty_like(weight, dtype=dtype) for weight in flat]
            torch._foreach_copy_(low, flat)
        flat = low
    size = len(whole[0])
    return [(weights, flat[size * number : size * (number + 1)]) for number, weights in enumerate(whole)]


class _BeforeAttention(torch.autograd.Function):
    """Sum, norm, three projections, rotary embedding: x [U D] and what is added -> x, q [U N H], k, v [U N_kv H]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        norm: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        low: Sequence[Tensor],
        cos: Tensor,
        sin: Tensor,
        epsilon: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        x, normed, scale = pointwise.added_norm(x, added, norm, epsilon, dtype)
        head = 2 * cos.shape[-1]
        query, key, value = (torch.mm(normed, w.T).view(len(x), -1, head) for w in low)
        query, key = pointwise.rotated(query, key, cos, sin, 1.0)
        ctx.has_added, ctx.kept, ctx.type = added is not None, wq.dtype, dtype
        ctx.save_for_backward(x, scale, norm, *low, cos, sin)
        return x, query, key, value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, by_x: Tensor, by_query: Tensor, by_key: Tensor, by_value: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, scale, norm, wq, wk, wv, cos, sin = ctx.saved_tensors
        by_query, by_key = pointwise.rotated(by_query, by_key, cos, sin, -1.0)
        sides = [by.reshape(len(x), -1) for by in (by_query, by_key, by_value)]
        normed = pointwise.norm_again(x, scale, norm, ctx.type)
        by_weights = [_by_weight(side, normed, ctx.kept) for side in sides]
        by_normed = _sum_of_products(sides, (wq, wk, wv))
        by_x, by_added, by_norm = pointwise.norm_backward(by_normed, by_x, x, scale, norm)
        return by_x, by_added if ctx.has_added else None, by_norm, *by_weights, None, None, None, None, None


class _BehindAttention(torch.autograd.Function):
    """x + attended Wo, and what is to be added to it: silu(n Wg) * (n Wu) Wd with n its norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attended: Tensor,
        norm: Tensor,
        wo: Tensor,
        wg: Tensor,
        wu: Tensor,
        wd: Tensor,
        low: Sequence[Tensor],
        epsilon: float,
    ) -> tuple[Tensor, Tensor]:
        output, *inner, down = low
        x, normed, scale = pointwise.added_norm(x, torch.mm(attended, output.T), norm, epsilon, attended.dtype)
        gate, up = (torch.mm(normed, w.T) for w in inner)
        ctx.kept = wo.dtype
        ctx.save_for_backward(attended, x, scale, gate, up, norm, *low)
        return x, torch.mm(pointwise.gated(gate, up), down.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_x: Tensor, by_added: Tensor) -> tuple[Tensor | None, ...]:
        attended, x, scale, gate, up, norm, wo, wg, wu, wd = ctx.saved_tensors
        inner, by_gate, by_up = pointwise.gated_backward(torch.mm(by_added, wd), gate, up)
        normed = pointwise.norm_again(x, scale, norm, attended.dtype)
        by_wd, by_wg = _by_weight(by_added, inner, ctx.kept), _by_weight(by_gate, normed, ctx.kept)
        by_wu = _by_weight(by_up, normed, ctx.kept)
        by_normed = _sum_of_products((by_gate, by_up), (wg, wu))
        by_x, by_low, by_norm = pointwise.norm_backward(by_normed, by_x, x, scale, norm)
        by_wo = _by_weight(by_low, attended, ctx.kept)
        return by_x, torch.mm(by_low, wo), by_norm, by_wo, by_wg, by_wu, by_wd, None, None


class _Norm(torch.autograd.Function):
    """norm (x + added) / rms(x + added)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, norm: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        x, normed, scale = pointwise.added_norm(x, added, norm, epsilon, dtype)
        ctx.type = added.dtype
        ctx.save_for_backward(x, scale, norm)
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, norm = ctx.saved_tensors
        by_x, _, by_norm = pointwise.norm_backward(by_out, torch.zeros_like(x), x, scale, norm)
        return by_x, by_x.to(ctx.type), by_norm, None, None


def _attention(query: Tensor, key: Tensor, value: Tensor, cuts: Cuts, lengths: Sequence[int], scaling: float) -> Tensor:
    """Causal attention of every sequence to itself: [U N H], [U N_kv H] -> [U N H flat]."""
    if varlen.is_there(query):
        return varlen.attend(query, key, value, cuts, scaling, None).flatten(1)
    return varlen.one_by_one(query, key, value, lengths, scaling).flatten(1)


def _by_weight(by_output: Tensor, given: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [O I] by a weight, summed in float32 and kept in the weight's type."""
    if dtype != by_output.dtype and torch.version.cuda is not None:
        return torch.mm(by_output.T, given, out_dtype=dtype)
    return torch.mm(by_output.T, given).to(dtype)


def _sum_of_products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """a1 @ b1 + a2 @ b2 + ..., each added as it is written."""
    total = torch.mm(first[0], second[0])
    for a, b in zip(first[1:], second[1:], strict=True):
        total.addmm_(a, b)
    return total
