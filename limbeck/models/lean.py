"""Forward and backward pass of a Llama-type backbone over packed sequences, in few passes over memory.

Same mathematics as transformers' own modules, for float32 training on a CPU, where everything but the products is
bound by memory traffic. Three things are saved against the module-by-module form:

1. Element-wise chains (norms, rotary embedding, gate) run in place, and their backward passes are closed forms.
2. What is cheap to compute again (norm outputs, the gated product) is not kept for the backward pass: a layer keeps
   x, q, k, v, the attention's output, the sum after it, gate and up, which is 4 (5 D + 2 K + 2 F) bytes a token (K the
   width of the keys).
3. Tokens that cannot change the result are left out (`plan_packed`): those behind the last needed position of their
   sequence, and all but one copy of the prefix that all sequences begin with (system prompt, template). In the last
   layer only the needed positions go through the feed-forward part.

`can_run` says whether a model fits; any other model takes transformers' own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.models.ops import rotate_, unit_of

LAYOUTS = ("LlamaModel", "MistralModel")
"""Backbones of transformers whose layers are laid out as below."""


class PackedPlan(NamedTuple):
    """Which tokens of a packed row are computed."""

    kept: Tensor
    """int64 [U]: indices of the computed tokens: the first sequence, then what each other one has behind the prefix."""
    lengths: tuple[int, ...]
    """Tokens of each sequence that attention sees, prefix included."""
    prefix: int
    """Tokens that all sequences begin with and that are computed once; 0 with one sequence."""
    rows: Tensor
    """int64 [N]: where the needed positions stand among the computed tokens."""

    @property
    def own(self) -> list[int]:
        """Tokens of each sequence behind the prefix."""
        return [length - self.prefix for length in self.lengths]

    @property
    def is_joint(self) -> bool:
        """Whether attention takes all sequences together, because that is fewer products than one by one."""
        return self.prefix > 0 and self._joint_pairs <= self._single_pairs

    @property
    def attention_pairs(self) -> int:
        """Pairs of query and key that attention multiplies."""
        return self._joint_pairs if self.is_joint else self._single_pairs

    @property
    def _joint_pairs(self) -> int:
        behind = sum(self.own)
        return self.prefix**2 + behind * (self.prefix + behind)

    @property
    def _single_pairs(self) -> int:
        return sum(length**2 for length in self.lengths)


def plan_packed(input_ids: Tensor, lengths: Sequence[int], rows: Tensor, *, shares: bool = True) -> PackedPlan:
    """The smallest set of tokens that gives the hidden states at `rows`.

    Args:
      input_ids: int64 [T], the sequences behind one another.
      lengths: tokens of each sequence, adding up to T.
      rows: int64 [N], increasing indices of the needed positions.
      shares: whether what all sequences begin with is computed once.
    """
    ids, needed = input_ids.cpu().numpy(), rows.cpu().numpy()
    ends = np.cumsum(lengths)
    starts = ends - np.asarray(lengths)
    owner = np.searchsorted(ends, needed, side="right")
    used = np.unique(owner)
    last = needed[np.searchsorted(owner, used, side="right") - 1]
    spans = [(int(starts[i]), int(stop) + 1) for i, stop in zip(used, last, strict=True)]
    prefix = _common_prefix([ids[start:stop] for start, stop in spans]) if shares else 0
    place = np.full(len(ids), -1, dtype=np.int64)
    kept: list[np.ndarray] = []
    computed = 0
    for number, (start, stop) in enumerate(spans):
        own = np.arange(start + (prefix if number else 0), stop)
        place[start : start + prefix] = np.arange(prefix)
        place[own] = np.arange(computed, computed + len(own))
        kept.append(own)
        computed += len(own)
    device = input_ids.device
    return PackedPlan(
        torch.from_numpy(np.concatenate(kept)).to(device),
        tuple(stop - start for start, stop in spans),
        prefix,
        torch.from_numpy(place[needed]).to(device),
    )


def can_run(backbone: nn.Module) -> bool:
    """Whether `packed_rows` computes what this backbone does: a plain float32 Llama on a CPU, without adapters."""
    if not has_plain_layers(backbone) or torch.is_autocast_enabled("cpu"):
        return False
    if any(module._forward_pre_hooks for module in backbone.modules()):
        return False  # someone changes what enters a module (a rounded cache), and modules are not called here
    return all(
        parameter.dtype == torch.float32 and parameter.device.type == "cpu" for parameter in backbone.parameters()
    )


def has_plain_layers(backbone: nn.Module) -> bool:
    """Whether a backbone is of the kind that `packed_rows` knows, wherever its weights are."""
    config: Any = getattr(backbone, "config", None)
    if type(backbone).__name__ not in LAYOUTS or config.hidden_act != "silu":
        return False
    if any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules()):
        return False
    if getattr(config, "sliding_window", None) or (backbone.training and config.attention_dropout):
        return False
    return all(
        type(module) is nn.Linear and module.bias is None
        for layer in backbone.layers  # type: ignore[union-attr]
        for module in (*attention_linears(layer), *feed_forward_linears(layer))
    )


def packed_rows(backbone: Any, input_ids: Tensor, positions: Tensor, plan: PackedPlan) -> Tensor:
    """Last hidden states [N D] at the needed positions of a packed row.

    Args:
      backbone: a model that `can_run`.
      input_ids: int64 [T]; positions: int64 [T], restarting with every sequence.
      plan: which tokens to compute, from `plan_packed`.
    """
    hidden = nn.functional.embedding(input_ids[plan.kept], backbone.embed_tokens.weight)
    cos, sin = (
        table[0, :, None, : table.shape[-1] // 2]
        for table in backbone.rotary_emb(hidden[None], position_ids=positions[plan.kept][None])
    )
    last = len(backbone.layers) - 1
    for number, layer in enumerate(backbone.layers):
        norm = layer.input_layernorm
        query, key, value = _Projections.apply(
            hidden, norm.weight, *(linear.weight for linear in attention_linears(layer)[:3]), cos, sin, epsilon_of(norm)
        )
        attended = _attention(query, key, value, plan, layer.self_attn.scaling)
        if number == last:
            hidden, attended = hidden[plan.rows], attended[plan.rows]
        norm = layer.post_attention_layernorm
        hidden = _OutputAndFeedForward.apply(
            hidden,
            attended,
            layer.self_attn.o_proj.weight,
            norm.weight,
            *(linear.weight for linear in feed_forward_linears(layer)),
            epsilon_of(norm),
        )
    return _Norm.apply(hidden, backbone.norm.weight, epsilon_of(backbone.norm))


class _Projections(torch.autograd.Function):
    """Norm, the three projections, rotary embedding: x [U D] -> q [U N H], k and v [U N_kv H]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, cos: Tensor, sin: Tensor, epsilon: float
    ) -> tuple[Tensor, ...]:
        unit, scale = unit_of(x, epsilon)
        ctx.save_for_backward(x, scale, norm, wq, wk, wv, cos, sin)
        normed = unit.mul_(norm)
        head = 2 * cos.shape[-1]
        query, key, value = (torch.mm(normed, w.T).view(len(x), -1, head) for w in (wq, wk, wv))
        return rotate_(query, cos, sin), rotate_(key, cos, sin), value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_query: Tensor, by_key: Tensor, by_value: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, norm, wq, wk, wv, cos, sin = ctx.saved_tensors
        tokens = len(x)
        # A rotation's transpose is the rotation by the opposite angle.
        by_q = rotate_(by_query.contiguous(), cos, sin, -1.0).view(tokens, -1)
        by_k = rotate_(by_key.contiguous(), cos, sin, -1.0).view(tokens, -1)
        by_v = by_value.reshape(tokens, -1)
        unit = x * scale
        normed = unit * norm
        by_weights = [torch.mm(g.T, normed) for g in (by_q, by_k, by_v)]
        by_normed = _sum_of_products((by_q, wq), (by_k, wk), (by_v, wv))
        by_x, by_norm = _norm_backward_(by_normed, unit, scale, norm)
        return by_x, by_norm, *by_weights, None, None, None


class _OutputAndFeedForward(torch.autograd.Function):
    """x + attended Wo, then + silu(n Wg) * (n Wu) Wd with n its norm: [N D] -> [N D]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attended: Tensor,
        wo: Tensor,
        norm: Tensor,
        wg: Tensor,
        wu: Tensor,
        wd: Tensor,
        epsilon: float,
    ) -> Tensor:
        x = torch.addmm(x, attended, wo.T)
        unit, scale = unit_of(x, epsilon)
        normed = unit.mul_(norm)
        gate, up = torch.mm(normed, wg.T), torch.mm(normed, wu.T)
        ctx.save_for_backward(attended, x, scale, gate, up, wo, norm, wg, wu, wd)
        gated = nn.functional.silu(gate).mul_(up)
        return torch.addmm(x, gated, wd.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        attended, x, scale, gate, up, wo, norm, wg, wu, wd = ctx.saved_tensors
        silu = nn.functional.silu(gate)
        by_wd = torch.mm(by_out.T, silu * up)
        by_gated = torch.mm(by_out, wd)
        by_up = silu.mul_(by_gated)
        by_gate = torch.ops.aten.silu_backward(by_gated.mul_(up), gate)
        unit = x * scale
        normed = unit * norm
        by_wg, by_wu = torch.mm(by_gate.T, normed), torch.mm(by_up.T, normed)
        by_normed = _sum_of_products((by_gate, wg), (by_up, wu))
        by_x, by_norm = _norm_backward_(by_normed, unit, scale, norm)
        by_x.add_(by_out)
        return by_x, torch.mm(by_x, wo), torch.mm(by_x.T, attended), by_norm, by_wg, by_wu, by_wd, None


class _Norm(torch.autograd.Function):
    """norm * x / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, epsilon: float) -> Tensor:
        unit, scale = unit_of(x, epsilon)
        ctx.save_for_backward(x, scale, norm)
        return unit.mul_(norm)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, norm = ctx.saved_tensors
        return *_norm_backward_(by_out.clone(), x * scale, scale, norm), None


def _attention(query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan, scaling: float) -> Tensor:
    """Causal attention of every sequence to itself: [U N H], [U N_kv H] -> [U N H flat]."""
    if plan.is_joint:
        return _joint_attention(query, key, value, plan, scaling)
    own = plan.own
    parts = [x.split([plan.prefix, *own]) for x in (query, key, value)]
    outputs = []
    for number in range(1, len(own) + 1):
        # The prefix is attended to, and attends, in every sequence; its output is the same in all and kept once.
        q, k, v = (torch.cat([p[0], p[number]]) if plan.prefix else p[number] for p in parts)
        # Key heads stand in the batch's place, [N_kv N/N_kv n H], their keys and values repeated without a copy:
        # torch's own form for grouped heads hands whole groups to its threads in the backward pass, too few of them.
        q = q.unflatten(1, (key.shape[1], -1)).permute(1, 2, 0, 3)
        k, v = (x.transpose(0, 1)[:, None].expand_as(q) for x in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).permute(2, 0, 1, 3)
        outputs.append(out[plan.prefix :] if number > 1 else out)
    return torch.cat(outputs).flatten(1)


def _joint_attention(query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan, scaling: float) -> Tensor:
    """The same in two products: the prefix to itself, then all that follows to the prefix and, masked, to itself."""
    prefix, own = plan.prefix, plan.own
    owner = torch.repeat_interleave(torch.arange(len(own)), torch.tensor(own))
    mask = torch.ones(len(owner), prefix + len(owner), dtype=torch.bool, device=query.device)
    mask[:, prefix:] = ((owner[:, None] == owner[None]).tril()).to(query.device)
    # Key heads stand in the batch's place, as above.
    q, k, v = (x.unflatten(1, (key.shape[1], -1)).permute(1, 2, 0, 3) for x in (query, key, value))
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    attend = nn.functional.scaled_dot_product_attention
    first = attend(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], is_causal=True, scale=scaling)
    rest = attend(q[:, :, prefix:], k, v, attn_mask=mask, scale=scaling)
    return torch.cat([first, rest], 2).permute(2, 0, 1, 3).flatten(1)


def _sum_of_products(first: tuple[Tensor, Tensor], *others: tuple[Tensor, Tensor]) -> Tensor:
    """a1 @ b1 + a2 @ b2 + ..., each added as it is written, in the form of addmm whose FLOPs torch's counter counts."""
    total = torch.mm(*first)
    for a, b in others:
        torch.addmm(total, a, b, out=total)
    return total


def _norm_backward_(by_out: Tensor, unit: Tensor, scale: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of norm * unit(x) by x and by norm; overwrites `by_out`.

    With u = unit, s = scale and g = by_out * norm: s (g - u mean(g u)), and the sum of by_out * u over the tokens.
    """
    product = by_out * unit
    mean = torch.mv(product, norm).div_(unit.shape[-1])
    by_x = by_out.mul_(norm).addcmul_(unit, mean[:, None], value=-1.0).mul_(scale)
    return by_x, product.sum(0)


def _common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Tokens that all sequences begin with, short of the shortest one's last; 0 for one sequence."""
    if len(sequences) < 2:
        return 0
    limit = min(len(sequence) for sequence in sequences) - 1
    stack = np.stack([sequence[:limit] for sequence in sequences])
    same = (stack == stack[0]).all(axis=0)
    return limit if same.all() else int(np.argmin(same))


def attention_linears(layer: Any) -> tuple[nn.Module, ...]:
    """Query, key, value, output."""
    attention = layer.self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj


def feed_forward_linears(layer: Any) -> tuple[nn.Module, ...]:
    """Gate, up, down."""
    return layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj


def epsilon_of(norm: Any) -> float:
    """What keeps a norm's root off 0."""
    return norm.variance_epsilon
