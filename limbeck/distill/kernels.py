"""The loss of rows of logits in Triton: each logit is read twice (three times for a mixture) and written once.

    row_stats     log-sum-exps of both sides, CE, and value and sum of D where they can be had in one pass
    row_sums      value and sum of D for the divergences that need the log-sum-exps first (mixtures, total variation)
    to_gradient   the student's logits become their own gradient
    log_sums, to_two_terms    the same for one side alone: CE, and the kept entries and the rest of top-k targets

A program takes a row, or a part of one; the vocabulary is read in parts, and all sums are float32. `fused` is the
reference (`divergence`, `rows`) and the path of CPUs. Needs the package triton; `device_loss` asks for it.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch
from torch import Tensor

triton: Any
tl: Any
try:
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
except ModuleNotFoundError:  # without it nothing here is called, but it may be read
    triton, tl = types.SimpleNamespace(jit=lambda function: function), None

KINDS = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "combined_kl": 2,
    "jsd": 3,
    "skew_kl": 4,
    "skew_reverse_kl": 5,
    "tvd": 6,
}
"""Divergences by the number that kernels know them by; those up to IN_ONE_PASS need no `row_sums`."""
IN_ONE_PASS = 2
STATS = 6
"""Numbers of a row: log-sum-exp at temperature 1, of student and teacher over the common entries at T, CE, D, sum of
dD / dlog s."""
BLOCK = 4096
"""Entries that a program holds at once."""


@triton.jit
def _terms(
    log_s: tl.tensor, log_t: tl.tensor, log_share: tl.tensor, log_other: tl.tensor, p: tl.tensor, KIND: tl.constexpr
) -> Any:
    """An entry's part of D and dD / dlog s; the mixture is exp(log_share) s + exp(log_other) t."""
    s, t = tl.exp(log_s), tl.exp(log_t)
    if KIND == 0:
        value, slope = t * (log_t - log_s), -t
    elif KIND == 1:
        value, slope = s * (log_s - log_t), s * (log_s - log_t + 1)
    elif KIND == 2:
        value = p * t * (log_t - log_s) + (1 - p) * s * (log_s - log_t)
        slope = -p * t + (1 - p) * s * (log_s - log_t + 1)
    elif KIND == 6:
        value = 0.5 * tl.abs(s - t)
        slope = 0.5 * s * (tl.where(s > t, 1.0, 0.0) - tl.where(s < t, 1.0, 0.0))
    else:
        ours, theirs = log_s + log_share, log_t + log_other
        larger = tl.maximum(ours, theirs)
        log_mix = larger + tl.log(tl.exp(ours - larger) + tl.exp(theirs - larger))
        share = tl.exp(ours - log_mix)
        if KIND == 3:
            value = (1 - p) * t * (log_t - log_mix) + p * s * (log_s - log_mix)
            slope = p * s * (log_s - log_mix + 1 - share) - (1 - p) * share * t
        elif KIND == 4:
            value, slope = t * (log_t - log_mix), -t * share
        else:
            value, slope = s * (log_s - log_mix), s * (log_s - log_mix + 1 - share)
    return value, slope


@triton.jit
def _rescale(old: tl.tensor, new: tl.tensor) -> Any:
    """exp(old - new), and 0 before anything was seen."""
    return tl.where(old == -float("inf"), 0.0, tl.exp(old - new))


@triton.jit
def row_stats(
    s_ptr: tl.tensor,
    t_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    stride_s: tl.tensor,
    stride_t: tl.tensor,
    inv_t: tl.tensor,
    p: tl.tensor,
    V: tl.constexpr,
    W: tl.constexpr,
    KIND: tl.constexpr,
    HAS_CE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One pass over a row of both sides."""
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * stride_s
    t_ptr += row * stride_t
    top_1, sum_1 = -float("inf"), 0.0
    top_s, sum_s, dot_s = -float("inf"), 0.0, 0.0  # dot_s: sum of s (zs - zt), times exp(lse_s)
    top_t, sum_t, dot_t = -float("inf"), 0.0, 0.0  # dot_t: sum of t (zt - zs), times exp(lse_t)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        common = v < W
        z = tl.load(s_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        zs = tl.where(common, z, -float("inf")) * inv_t
        zt = tl.load(t_ptr + v, mask=common, other=-float("inf")).to(tl.float32) * inv_t
        if HAS_CE:
            top = tl.maximum(top_1, tl.max(z, 0))
            sum_1 = sum_1 * _rescale(top_1, top) + tl.sum(tl.exp(z - top), 0)
            top_1 = top
        gap = tl.where(common, zt - zs, 0.0)
        top = tl.maximum(top_s, tl.max(zs, 0))
        factor, part = _rescale(top_s, top), tl.where(common, tl.exp(zs - top), 0.0)
        sum_s, dot_s, top_s = sum_s * factor + tl.sum(part, 0), dot_s * factor - tl.sum(part * gap, 0), top
        top = tl.maximum(top_t, tl.max(zt, 0))
        factor, part = _rescale(top_t, top), tl.where(common, tl.exp(zt - top), 0.0)
        sum_t, dot_t, top_t = sum_t * factor + tl.sum(part, 0), dot_t * factor + tl.sum(part * gap, 0), top
    lse_s, lse_t = top_s + tl.log(sum_s), top_t + tl.log(sum_t)
    stats_ptr += row * 6
    tl.store(stats_ptr + 1, lse_s)
    tl.store(stats_ptr + 2, lse_t)
    if HAS_CE:
        lse_1 = top_1 + tl.log(sum_1)
        tl.store(stats_ptr, lse_1)
        tl.store(stats_ptr + 3, lse_1 - tl.load(s_ptr + tl.load(labels_ptr + row)).to(tl.float32))
    if KIND <= 2:
        forward, reverse = dot_t / sum_t + lse_s - lse_t, dot_s / sum_s + lse_t - lse_s
        share = 1.0 if KIND == 0 else (0.0 if KIND == 1 else p)
        tl.store(stats_ptr + 4, share * forward + (1 - share) * reverse)
        tl.store(stats_ptr + 5, (1 - share) * (reverse + 1) - share)


@triton.jit
def row_sums(
    s_ptr: tl.tensor,
    t_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    stride_s: tl.tensor,
    stride_t: tl.tensor,
    inv_t: tl.tensor,
    p: tl.tensor,
    log_share: tl.tensor,
    log_other: tl.tensor,
    W: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """D of a row and the sum of dD / dlog s, from its log-sum-exps."""
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * stride_s
    t_ptr += row * stride_t
    stats_ptr += row * 6
    lse_s, lse_t = tl.load(stats_ptr + 1), tl.load(stats_ptr + 2)
    value, slope = 0.0, 0.0
    for start in range(0, W, BLOCK):
        v = start + tl.arange(0, BLOCK)
        log_s = tl.load(s_ptr + v, mask=v < W, other=0.0).to(tl.float32) * inv_t - lse_s
        log_t = tl.load(t_ptr + v, mask=v < W, other=0.0).to(tl.float32) * inv_t - lse_t
        values, slopes = _terms(log_s, log_t, log_share, log_other, p, KIND)
        value += tl.sum(tl.where(v < W, values, 0.0), 0)
        slope += tl.sum(tl.where(v < W, slopes, 0.0), 0)
    tl.store(stats_ptr + 4, value)
    tl.store(stats_ptr + 5, slope)


@triton.jit
def to_gradient(
    s_ptr: tl.tensor,
    t_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    ce_ptr: tl.tensor,
    kd_ptr: tl.tensor,
    stride_s: tl.tensor,
    stride_t: tl.tensor,
    inv_t: tl.tensor,
    p: tl.tensor,
    log_share: tl.tensor,
    log_other: tl.tensor,
    V: tl.constexpr,
    W: tl.constexpr,
    KIND: tl.constexpr,
    HAS_CE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Logits become ce (softmax - onehot) + kd / T (dD / dlog s - s sum of dD / dlog s)."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    stats_ptr += row * 6
    lse_s, lse_t, total = tl.load(stats_ptr + 1), tl.load(stats_ptr + 2), tl.load(stats_ptr + 5)
    z = tl.load(s_ptr + row * stride_s + v, mask=v < V, other=0.0).to(tl.float32)
    zt = tl.load(t_ptr + row * stride_t + v, mask=v < W, other=0.0).to(tl.float32)
    log_s = z * inv_t - lse_s
    _, slope = _terms(log_s, zt * inv_t - lse_t, log_share, log_other, p, KIND)
    kd = tl.load(kd_ptr + row) * inv_t
    gradient = tl.where(v < W, kd * (slope - tl.exp(log_s) * total), 0.0)
    if HAS_CE:
        own = tl.where(v == tl.load(labels_ptr + row), 1.0, 0.0)
        gradient += tl.load(ce_ptr + row) * (tl.exp(z - tl.load(stats_ptr)) - own)
    tl.store(s_ptr + row * stride_s + v, gradient.to(s_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def log_sums(z_ptr: tl.tensor, out_ptr: tl.tensor, stride: tl.tensor, V: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Log-sum-exp of a row."""
    row = tl.program_id(0).to(tl.int64)
    top, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride + v, mask=v < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(z, 0))
        part = tl.where(z == -float("inf"), 0.0, tl.exp(z - new))
        total, top = total * _rescale(top, new) + tl.sum(part, 0), new
    tl.store(out_ptr + row, top + tl.log(total))


@triton.jit
def to_two_terms(
    z_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    stride: tl.tensor,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Logits become a exp(z - first) + b exp(z - second)."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * stride + v, mask=v < V, other=-float("inf")).to(tl.float32)
    found = tl.load(a_ptr + row) * tl.exp(z - tl.load(first_ptr + row))
    found += tl.load(b_ptr + row) * tl.exp(z - tl.load(second_ptr + row))
    found = tl.where(z == -float("inf"), 0.0, found)
    tl.store(z_ptr + row * stride + v, found.to(z_ptr.dtype.element_ty), mask=v < V)


def dense_loss_(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    ce_coef: Tensor,
    kd_coef: Tensor,
    kind: int,
    numbers: tuple[float, float, float],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """CE [n] and D [n] of rows; `student` becomes the gradient of sum ce_coef CE + kd_coef D.

    Args:
      student: [n V] logits, bf16 or float32; teacher: [n W] logits of the first W <= V entries.
      labels: int64 [n]; None for no CE.
      ce_coef, kd_coef: float32 [n].
      kind: of KINDS.
      numbers: the divergence's parameter, and the log weights of student and teacher in its mixture.
      temperature: of D.
    """
    n, vocab, common = len(student), student.shape[1], teacher.shape[1]
    stats = torch.zeros(n, STATS, dtype=torch.float32, device=student.device)
    has_ce, block = labels is not None, min(BLOCK, triton.next_power_of_2(vocab))
    where = kd_coef.new_zeros(1, dtype=torch.int64) if labels is None else labels
    strides, cold = (student.stride(0), teacher.stride(0)), 1.0 / temperature
    sizes: dict[str, Any] = {"V": vocab, "W": common, "KIND": kind, "HAS_CE": has_ce, "BLOCK": block}
    row_stats[(n,)](student, teacher, where, stats, *strides, cold, numbers[0], **sizes, num_warps=8)
    if kind > IN_ONE_PASS:
        row_sums[(n,)](student, teacher, stats, *strides, cold, *numbers, W=common, KIND=kind, BLOCK=block, num_warps=8)
    grid = (n, triton.cdiv(vocab, block))
    to_gradient[grid](student, teacher, where, stats, ce_coef, kd_coef, *strides, cold, *numbers, **sizes, num_warps=8)
    return stats[:, 3], stats[:, 4]


def log_sums_of(logits: Tensor) -> Tensor:
    """Log-sum-exp [n] of rows [n V], float32."""
    found = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    log_sums[(len(logits),)](logits, found, logits.stride(0), V=logits.shape[1], BLOCK=block, num_warps=8)
    return found


def two_terms_(logits: Tensor, first: Tensor, second: Tensor, a: Tensor, b: Tensor) -> None:
    """Rows [n V] become a exp(z - first) + b exp(z - second), all of these float32 [n]; 0 where z is -inf."""
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    grid = (len(logits), triton.cdiv(logits.shape[1], block))
    to_two_terms[grid](logits, first, second, a, b, logits.stride(0), V=logits.shape[1], BLOCK=block, num_warps=8)
