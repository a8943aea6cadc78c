"""Head and loss in one: CE and a divergence from hidden states, without the logits of all positions at once.

`fused_loss` in four steps:

1. Keep the rows whose CE or KD coefficient is not zero; no other row reaches the head.
2. For each chunk of rows, as many as a byte budget holds, multiply by the head into one [C V] buffer that is
   allocated once; for a dense teacher, by the teacher's head into a second one.
3. Turn the logits into their own gradient, in place, in blocks of rows that stay in cache (`rowloss`). Loss
   and gradient are closed forms in float32 (float64 for float64 inputs).
4. Multiply that gradient by the head and by the hidden states, for the gradients of both. All of this happens
   in the forward pass; the backward pass hands the gradients over, times what arrives from above.

Sums over chunks are kept in float32; the products run in the type of the inputs or of autocast (`head`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.head import Head
from limbeck.distill.rowloss import row_loss
from limbeck.distill.rows import Rows, check_shapes, make_rows
from limbeck.distill.vocabulary import WHOLE, VocabularyPart, gather_rows, own_rows
from limbeck.errors import ConfigError
from limbeck.teacher.targets import DenseTargets, SeveralTargets, TeacherTargets

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
    part: VocabularyPart | None = None,
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
        part: the heads are those rows of the vocabulary alone. All processes of the group call together, each with rows
            of its own; the value of all their rows is returned in equal shares, the gradients are of them all.

    Returns: FusedLoss; when all coefficients are 0 the total is 0 and so are the gradients.

    Raises: ShapeError for tensors that do not fit, or a label or a top-k id outside the vocabulary;
        ConfigError for a temperature or a budget that is not positive.
    """
    vocab = len(head_weight) if vocab_size is None else vocab_size
    if part is None:
        check_shapes(hidden, head_weight, labels, head_bias, ce_coef, kd_coef, targets, vocab)
    if not (temperature > 0 and chunk_bytes > 0):
        raise ConfigError(f"fused_loss: temperature {temperature} and chunk_bytes {chunk_bytes} must be above 0.")
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    inputs, num_entries = (hidden, head_weight, head_bias), vocab
    if part is not None:
        assert not isinstance(targets, SeveralTargets), "weighted_fused_loss takes several teachers apart"
        hidden, labels, ce_coef, kd_coef, targets = gather_rows(part.group, hidden, labels, ce_coef, kd_coef, targets)
        hidden.requires_grad_(inputs[0].requires_grad)
        num_entries = part.stop - part.start
    gradients = _Gradients.zeros(compute, hidden, head_weight, head_bias)
    student, teacher = Head(hidden, head_weight, head_bias, num_entries), None
    if isinstance(targets, DenseTargets) and bool(kd_coef.any()):
        teacher = Head(targets.hidden, targets.head_weight, targets.head_bias, num_entries)
    loss = functools.partial(row_loss, divergence=divergence.bind(), temperature=temperature, vocabulary=part or WHOLE)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        kd_scale = temperature**2 if scale_by_temperature_squared else 1.0
        rows = make_rows(labels, ce_coef.to(compute), kd_coef.to(compute) * kd_scale, targets, vocab)
        ce_sum, kd_sum, head_rows = _accumulate(
            student, teacher, rows, loss, chunk_bytes, gradients, None if part is None else part.largest
        )
        if part is not None:
            ce_sum, kd_sum = ce_sum / part.group.size(), kd_sum / part.group.size()
            gradients = gradients.of_rows(part, len(inputs[0]))
    total = _KnownGradients.apply(ce_sum + kd_sum, gradients, *inputs)
    return FusedLoss(total, ce_sum, kd_sum, head_rows)


class _KnownGradients(torch.autograd.Function):
    """Gives `total` the gradients that are already there."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: _Gradients, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, from_above: Tensor) -> tuple[Tensor | None, ...]:
        # Mostly 1: then the head's gradient, the largest tensor of a step, is handed over and not copied.
        one = bool(from_above == 1)
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *(g if g is None else (g if one else g * from_above).to(t) for g, t in gradients)


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Of the total, by each input that wants one."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(compute: torch.dtype, *inputs: Tensor | None) -> _Gradients:
        def zeros(x: Tensor | None) -> Tensor | None:
            if x is None or not (x.requires_grad and torch.is_grad_enabled()):
                return None
            return torch.zeros_like(x, dtype=compute)

        hidden, weight, bias = (zeros(x) for x in inputs)
        return _Gradients(hidden, weight, bias)

    def of_rows(self, part: VocabularyPart, length: int) -> _Gradients:
        """With the hidden gradient of this process's rows alone, from what all parts of the vocabulary add to it."""
        own = None if self.hidden is None else own_rows(part.group, self.hidden, length)
        return _Gradients(own, self.weight, self.bias)

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
    student: Head,
    teacher: Head | None,
    rows: Rows,
    loss: Callable[[Tensor, Tensor | None, Rows], tuple[Tensor, Tensor]],
    chunk_bytes: int,
    gradients: _Gradients,
    part_entries: int | None,
) -> tuple[Tensor, Tensor, int]:
    """Sums of the weighted CE and KD terms and the number of their rows; fills `gradients` on the way.

    Where heads are parts, `part_entries` is the size of the largest: all processes must cut the same chunks.
    """
    index = torch.nonzero((rows.ce_coef != 0) | (rows.kd_coef != 0))[:, 0]
    heads = [student] if teacher is None else [student, teacher]
    limit = chunk_bytes // sum(head.row_bytes(part_entries) for head in heads)
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
        block_rows = len(chunk) if part_entries else _block_rows(logits.shape[1] * sums.itemsize, logits.device.type)
        sums += _to_gradient(student, logits, teacher, teacher_logits, part, loss, block_rows)
        gradients.add(chunk, states, logits, student.weight)
    return sums[0], sums[1], len(index)


def _to_gradient(
    student: Head,
    logits: Tensor,
    teacher: Head | None,
    teacher_logits: Tensor | None,
    rows: Rows,
    loss: Callable[[Tensor, Tensor | None, Rows], tuple[Tensor, Tensor]],
    block_rows: int,
) -> Tensor:
    """The two sums [2] of a chunk; `logits` becomes the gradient, block by block."""
    compute = rows.ce_coef.dtype
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
