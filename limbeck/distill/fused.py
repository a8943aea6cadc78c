"""Head and loss in one: CE and a divergence from hidden states, without the logits of all positions at once.

`fused_loss` in four steps:

1. Keep the rows whose CE or KD coefficient is not zero; no other row reaches the head.
2. For each chunk of rows, as many as a byte budget holds, multiply by the head into one [C V] buffer that is
   allocated once; for a dense teacher, by the teacher's head into a second one.
3. Turn the logits into their own gradient, in place, in blocks of rows that stay in cache (`rowloss`). Loss
   and gradient are closed forms in float32 (float64 for float64 inputs).
4. Multiply that gradient by the head and by the hidden states, for the gradients of both. All of this happens
   in the forward pass; the backward pass hands the gradients over, times what arrives from above.

Products run in the type of `hidden` and `head_weight`, or autocast's. Half types are multiplied in float32 on
a CPU, where their own products can be a hundred times slower. Sums over chunks are kept in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.rowloss import Rows, row_loss
from limbeck.errors import ConfigError, ShapeError
from limbeck.teacher.targets import DenseTargets, TeacherTargets, TopKTargets

CHUNK_BYTES = 256 * 2**20
# On a CPU more rows than this make the products no faster.
CPU_CHUNK_ROWS = 256
# Size of one [rows V] temporary of the elementwise work: a thread's share of it fits its second-level cache on a
# CPU; on an accelerator it is large enough to hide the launches.
CPU_BLOCK_BYTES = 2**19
DEVICE_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class FusedLoss:
    """What `fused_loss` returns; only `total` carries a gradient."""

    total: Tensor
    """Scalar: sum of ce_coef * CE + kd_coef * T^2 * D."""
    ce_sum: Tensor
    """Scalar, detached: the CE part of `total`."""
    kd_sum: Tensor
    """Scalar, detached: the KD part of `total`, T^2 included."""
    head_rows: int
    """Rows that were multiplied by the head."""


def fused_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    head_bias: Tensor | None = None,
    ce_coef: Tensor,
    kd_coef: Tensor,
    targets: TeacherTargets,
    divergence: DivergenceConfig,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = True,
    vocab_size: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> FusedLoss:
    """sum_i ce_coef_i CE_i + kd_coef_i T^2 D_i, differentiable by the student's hidden states and head.

    CE_i = -log softmax(z_i)[label_i] at temperature 1. D compares softmax(z_i / T) with the teacher's at the
    same T. Averages and kd_ratio are in the coefficients, so that the parts of a batch add up exactly.

    Dense teacher: where the two vocabularies are padded to different sizes, D is over the entries that both
    have; the others hold no probability and get no gradient from D.

    Top-k teacher: D compares the distributions over K + 1 events, the K kept entries and "any other". At
    temperature 1 that is a lower bound of D over the whole vocabulary, and equals it when nothing is left
    over. The tail at T != 1 cannot be known from its mass at 1, so T acts on the K + 1 log-masses of both sides
    (divide by T, normalise again): still 0 when student = teacher, still the dense D when nothing is left over.

    Args:
        hidden: [N D] last hidden states at the supervised positions.
        head_weight: [V D].
        labels: int64 [N], the next tokens; any value where ce_coef is 0.
        head_bias: [V].
        ce_coef: float [N], weight of each CE term.
        kd_coef: float [N], weight of each KD term.
        targets: the teacher at the same N positions, not read where kd_coef is 0; None: text only.
        divergence: D.
        temperature: T > 0.
        scale_by_temperature_squared: multiply D by T^2, value and gradient; the gradient keeps its size.
        vocab_size: the student's real vocabulary; head rows from there on are padding and take no part.
        chunk_bytes: budget of the [C V] logit buffers, in bytes.

    Returns: FusedLoss; when all coefficients are 0 the total is 0 and so are the gradients.

    Raises: ShapeError for tensors that do not fit, or a label or a top-k id outside the vocabulary;
        ConfigError for a temperature or a budget that is not positive.
    """
    vocab = len(head_weight) if vocab_size is None else vocab_size
    _check_shapes(hidden, head_weight, labels, head_bias, ce_coef, kd_coef, targets, vocab)
    if not (temperature > 0 and chunk_bytes > 0):
        raise ConfigError(f"fused_loss: temperature {temperature} and chunk_bytes {chunk_bytes} must be above 0.")
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    gradients = _Gradients.zeros(hidden, head_weight, head_bias, compute)
    student = _Head(hidden, head_weight, head_bias, vocab)
    loss = functools.partial(row_loss, divergence=divergence.bind(), temperature=temperature)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        kd_scale = temperature**2 if scale_by_temperature_squared else 1.0
        rows = _rows(labels, ce_coef.to(compute), kd_coef.to(compute) * kd_scale, targets, vocab)
        teacher = None
        if isinstance(targets, DenseTargets) and bool(rows.kd_coef.any()):
            teacher = _Head(targets.hidden, targets.head_weight, targets.head_bias, vocab)
        ce_sum, kd_sum, head_rows = _accumulate(student, teacher, rows, loss, chunk_bytes, gradients)
    total = _KnownGradients.apply(ce_sum + kd_sum, gradients, hidden, head_weight, head_bias)
    return FusedLoss(total, ce_sum, kd_sum, head_rows)


class _KnownGradients(torch.autograd.Function):
    """Gives `total` the gradients that are already there."""

    @staticmethod
    def forward(
        ctx: Any, total: Tensor, gradients: _Gradients, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        by_weight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        by_bias = None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype)
        ctx.save_for_backward(gradients.hidden, by_weight, by_bias)
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, from_above: Tensor) -> tuple[Tensor | None, ...]:
        # Mostly 1: then the head's gradient, the largest tensor of a step, is handed over and not copied.
        if bool(from_above == 1):
            return None, None, *ctx.saved_tensors
        return None, None, *(g if g is None else g * from_above.to(g.dtype) for g in ctx.saved_tensors)


class _Head:
    """Makes the logits of some positions of a model, always in the same buffer."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int) -> None:
        self.hidden = hidden.detach()
        self.weight = weight.detach()[:vocab].to(_product_dtype(hidden, weight))
        self.bias = None if bias is None else bias.detach()[:vocab]
        self.row_bytes = len(self.weight) * self.weight.element_size()
        self.buffer = self.weight.new_empty(0)

    def allocate(self, rows: int) -> None:
        self.buffer = self.weight.new_empty(rows, len(self.weight))

    def states(self, index: Tensor) -> Tensor:
        """[n D], in the type of the products."""
        return self.hidden[index].to(self.weight.dtype)

    def logits(self, states: Tensor) -> Tensor:
        """[n V] without the bias; overwrites what the call before returned."""
        return torch.mm(states, self.weight.T, out=self.buffer[: len(states)])

    def finish(self, logits: Tensor, compute: torch.dtype) -> Tensor:
        """A block of `logits` with the bias added, in the compute type: in place where it has that type."""
        logits = logits.to(compute)
        return logits if self.bias is None else logits.add_(self.bias)


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Of the total, by each input that wants one."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(hidden: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> _Gradients:
        def zeros(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if x is None or not (x.requires_grad and torch.is_grad_enabled()):
                return None
            return torch.zeros_like(x, dtype=dtype, requires_grad=False)

        return _Gradients(zeros(hidden, hidden.dtype), zeros(weight, compute), zeros(bias, compute))

    def add(self, index: Tensor, states: Tensor, by_logits: Tensor, weight: Tensor) -> None:
        """Add what the rows `index` contribute; `by_logits` [n V] is the gradient by their logits."""
        if self.hidden is not None:
            self.hidden.index_copy_(0, index, torch.mm(by_logits, weight).to(self.hidden.dtype))
        if self.weight is not None and self.weight.dtype == by_logits.dtype:
            self.weight[: len(weight)].addmm_(by_logits.T, states)
        elif self.weight is not None:
            self.weight[: len(weight)].add_(torch.mm(by_logits.T, states))
        if self.bias is not None:
            self.bias[: len(weight)].add_(by_logits.sum(0, dtype=self.bias.dtype))


def _accumulate(
    student: _Head,
    teacher: _Head | None,
    rows: Rows,
    loss: Callable[[Tensor, Tensor | None, Rows], tuple[Tensor, Tensor]],
    chunk_bytes: int,
    gradients: _Gradients,
) -> tuple[Tensor, Tensor, int]:
    """Sums of the weighted CE and KD terms and the number of their rows; fills `gradients` on the way."""
    index = torch.nonzero((rows.ce_coef != 0) | (rows.kd_coef != 0))[:, 0]
    heads = [student] if teacher is None else [student, teacher]
    limit = chunk_bytes // sum(head.row_bytes for head in heads)
    if student.buffer.device.type == "cpu":
        limit = min(limit, CPU_CHUNK_ROWS)
    chunk_rows = _even_parts(len(index), limit)
    for head in heads:
        head.allocate(chunk_rows)
    sums = rows.ce_coef.new_zeros(2)
    for start in range(0, len(index), chunk_rows):
        chunk = index[start : start + chunk_rows]
        part = rows[chunk]
        states = student.states(chunk)
        logits = student.logits(states)
        teacher_logits = None
        if teacher is not None:
            teacher_logits = teacher.logits(teacher.states(chunk).masked_fill(part.kd_coef == 0, 0.0))
        sums += _to_gradient(student, logits, teacher, teacher_logits, part, loss)
        gradients.add(chunk, states, logits, student.weight)
    return sums[0], sums[1], len(index)


def _to_gradient(
    student: _Head,
    logits: Tensor,
    teacher: _Head | None,
    teacher_logits: Tensor | None,
    rows: Rows,
    loss: Callable[[Tensor, Tensor | None, Rows], tuple[Tensor, Tensor]],
) -> Tensor:
    """The two sums [2] of a chunk; `logits` becomes the gradient, block by block."""
    compute = rows.ce_coef.dtype
    block_rows = _block_rows(logits.shape[1] * compute.itemsize, logits.device.type)
    sums = rows.ce_coef.new_zeros(2)
    for start in range(0, len(logits), block_rows):
        block = slice(start, start + block_rows)
        student_block = student.finish(logits[block], compute)
        teacher_block = None
        if teacher is not None and teacher_logits is not None:
            teacher_block = teacher.finish(teacher_logits[block], compute)
        ce, kd = loss(student_block, teacher_block, rows[block])
        sums += torch.stack([torch.dot(rows.ce_coef[block, 0], ce), torch.dot(rows.kd_coef[block, 0], kd)])
        if student_block.dtype != logits.dtype:
            logits[block] = student_block
    return sums


def _block_rows(row_bytes: int, device: str) -> int:
    if device == "cpu":
        return max(1, CPU_BLOCK_BYTES // row_bytes) * torch.get_num_threads()
    return max(1, DEVICE_BLOCK_BYTES // row_bytes)


def _even_parts(length: int, limit: int) -> int:
    """The size of equal parts of `length` that are at most `limit` long, and at least 1."""
    parts = -(-length // max(1, limit))
    return -(-length // max(1, parts)) or 1


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if device == "cpu" and dtype.itemsize < 4 else dtype


def _rows(labels: Tensor, ce_coef: Tensor, kd_coef: Tensor, targets: TeacherTargets, vocab: int) -> Rows:
    """Labels, coefficients and top-k targets, checked; blanked where their coefficient is 0."""
    with_ce, with_kd = ce_coef != 0, kd_coef != 0
    if targets is None and bool(with_kd.any()):
        raise ShapeError("fused_loss: kd_coef is not 0 but targets is None; give targets, or kd_coef 0.")
    labels = labels.long().masked_fill(~with_ce, 0)
    _check_ids("label", labels, vocab)
    topk = None
    if isinstance(targets, TopKTargets) and bool(with_kd.any()):
        some_ids = torch.arange(targets.ids.shape[1], device=labels.device)
        topk = TopKTargets(
            ids=torch.where(with_kd[:, None], targets.ids, some_ids),
            log_probs=targets.log_probs.to(ce_coef.dtype).masked_fill(~with_kd[:, None], 0.0),
            log_tail=targets.log_tail.to(ce_coef.dtype).masked_fill(~with_kd, 0.0),
        )
        _check_ids("top-k id", topk.ids, vocab)
    return Rows(
        labels=labels[:, None] if bool(with_ce.any()) else None,
        ce_coef=ce_coef.detach()[:, None],
        kd_coef=kd_coef.detach()[:, None],
        topk=topk,
    )


def _check_ids(name: str, ids: Tensor, vocab: int) -> None:
    bad = (ids < 0) | (ids >= vocab)
    if bool(bad.any()):
        where = torch.nonzero(bad)[0].tolist()
        raise ShapeError(
            f"fused_loss: {name} {int(ids[tuple(where)])} at row {where[0]} is outside the vocabulary of "
            f"{vocab}; give rows without a target a coefficient of 0."
        )


def _check_shapes(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    head_bias: Tensor | None,
    ce_coef: Tensor,
    kd_coef: Tensor,
    targets: TeacherTargets,
    vocab: int,
) -> None:
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ShapeError(
            f"fused_loss: hidden {tuple(hidden.shape)} and head_weight {tuple(head_weight.shape)}; "
            "expected [N D] and [V D]."
        )
    if not 0 < vocab <= len(head_weight):
        raise ShapeError(f"fused_loss: vocab_size {vocab} is not in 1 to {len(head_weight)}, the rows of the head.")
    if head_bias is not None and head_bias.shape != head_weight.shape[:1]:
        raise ShapeError(f"fused_loss: head_bias {tuple(head_bias.shape)}; expected {tuple(head_weight.shape[:1])}.")
    for name, value in (("labels", labels), ("ce_coef", ce_coef), ("kd_coef", kd_coef)):
        if value.shape != hidden.shape[:1]:
            raise ShapeError(f"fused_loss: {name} {tuple(value.shape)}; expected {tuple(hidden.shape[:1])}.")
    if targets is not None and len(targets) != len(hidden):
        raise ShapeError(f"fused_loss: {len(targets)} teacher targets for {len(hidden)} rows; expected as many.")
