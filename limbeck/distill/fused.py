"""Head and loss in one: CE and a divergence from hidden states, without the logits of all positions at once.

`fused_loss` in four steps:

1. Keep the rows whose CE or KD coefficient is not zero; no other row reaches the head.
2. For each chunk of rows, as many as a byte budget holds, multiply by the head into one [C V] buffer that is
   allocated once; for a dense teacher, by the teacher's head into a second one.
3. Turn the logits into their own gradient, in place, in blocks of rows that stay in cache: first D's, which the
   targets give (`TargetReader.row_loss`), then CE's on top. Loss and gradient are closed forms in float32 (float64 for
   float64 inputs).
4. Multiply that gradient by the head and by the hidden states, for the gradients of both. All of this happens
   in the forward pass; the backward pass hands the gradients over, times what arrives from above.

Sums over chunks are kept in float32; the products run in the type of the inputs or of autocast (`models.logits`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.cost.memory import CPU_BLOCK_BYTES, CPU_CHUNK_ROWS, DEVICE_BLOCK_BYTES
from limbeck.distill import device_loss
from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.gathered import gather_rows
from limbeck.distill.known_gradients import Gradients, KnownGradients
from limbeck.distill.rows import Rows, Terms, check_shapes, make_rows
from limbeck.errors import ConfigError, ShapeError
from limbeck.models.anatomy import Head
from limbeck.models.logits import ChunkedLogits
from limbeck.models.sharded_softmax import WHOLE, ShardedSoftmax
from limbeck.teacher.targets import Distance, OneTeacherTargets, TargetReader

CHUNK_BYTES = 256 * 2**20
DEVICE_CHUNK_BYTES = 2**30
"""On an accelerator: the head's gradient is read and written once a chunk, so that few large ones are better."""


def chunk_bytes_on(device: str) -> int:
    """Budget of the buffers for the logits of a chunk on a type of device."""
    return CHUNK_BYTES if device == "cpu" else DEVICE_CHUNK_BYTES


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

    @staticmethod
    def sum(losses: Sequence[FusedLoss]) -> FusedLoss:
        """The loss of several passes: one a teacher."""
        names = ("total", "ce_sum", "kd_sum")
        total, ce_sum, kd_sum = (torch.stack([getattr(loss, name) for loss in losses]).sum() for name in names)
        return FusedLoss(total, ce_sum, kd_sum, sum(loss.head_rows for loss in losses))


def fused_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    head_bias: Tensor | None = None,
    head_softcap: float | None = None,
    ce_coef: Tensor,
    kd_coef: Tensor,
    targets: OneTeacherTargets | None,
    divergence: DivergenceConfig,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = True,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    part: ShardedSoftmax | None = None,
    terms: Terms | None = None,
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
        head_softcap: c of the student's logits c tanh(logits / c).
        ce_coef: float [N], weight of each CE term.
        kd_coef: float [N], weight of each KD term.
        targets: the teacher at the same N positions, not read where kd_coef is 0; None: text only.
        divergence: D.
        temperature: T > 0.
        scale_by_temperature_squared: multiply D by T^2, value and gradient; the gradient keeps its size.
        vocab_size: the student's real vocabulary; head rows from there on are padding and take no part.
        chunk_bytes: budget of the [C V] logit buffers, in bytes; None: `chunk_bytes_on` the device.
        part: the heads are those rows of the vocabulary alone. All processes of the group call together, each with rows
            of its own; the value of all their rows is returned in equal shares, the gradients are of them all.
        terms: which terms the rows have, if that is known: each has one, and labels and top-k ids are right; None: the
            tensors are asked, for which a device is waited for.

    Returns: FusedLoss; when all coefficients are 0 the total is 0 and so are the gradients.

    Raises: ShapeError for tensors that do not fit, or a label or a top-k id outside the vocabulary;
        ConfigError for a temperature or a budget that is not positive.
    """
    chunk_bytes = chunk_bytes_on(hidden.device.type) if chunk_bytes is None else chunk_bytes
    if not (temperature > 0 and chunk_bytes > 0):
        raise ConfigError(f"fused_loss: temperature {temperature} and chunk_bytes {chunk_bytes} must be above 0.")
    inputs, vocab = (hidden, head_weight, head_bias), len(head_weight) if vocab_size is None else vocab_size
    if part is None:
        check_shapes(hidden, head_weight, labels, head_bias, ce_coef, kd_coef, targets, vocab)
    else:
        hidden, labels, ce_coef, kd_coef, targets = gather_rows(part.group, hidden, labels, ce_coef, kd_coef, targets)
        hidden.requires_grad_(inputs[0].requires_grad)
    compute = torch.promote_types(hidden.dtype, torch.float32)
    gradients = Gradients.zeros(compute, hidden, head_weight, head_bias)
    with torch.no_grad():
        kd_coef = kd_coef.to(compute) * (temperature**2 if scale_by_temperature_squared else 1.0)
        rows, softmax = make_rows(labels, ce_coef.to(compute), kd_coef, vocab, terms), part or WHOLE
        head = Head(head_weight, head_bias, head_softcap)
        student = ChunkedLogits(hidden, head, softmax.entries(vocab), softmax.largest)
        distance = Distance(divergence.bind(), temperature, softmax, terms is not None)
        teacher = _reader(targets, kd_coef, vocab, distance, terms)
        if teacher.has_frozen_head:
            _check_projected(gradients, divergence)
        index = rows.used() if terms is None else torch.arange(len(hidden), device=hidden.device)
        sums = kd_coef.new_zeros(2)
        with torch.autocast(hidden.device.type, enabled=False):
            by_kernels = device_loss.takes(student, teacher, compute, part)
            for chunk in _chunks(index, student, teacher, rows, chunk_bytes):
                chunk_sums = torch.zeros_like(sums)
                if by_kernels:
                    chunk_sums += device_loss.chunk_loss_(chunk.logits, chunk.rows, teacher, divergence, temperature)
                for block, by_logits in () if by_kernels else _blocks(student, chunk.logits, compute, part):
                    # Logits at first; D's gradient takes their place, then CE's is added.
                    log_probs = chunk.rows[block].log_softmax(by_logits, softmax)
                    kd = teacher.row_loss(block, by_logits, log_probs, chunk.rows.kd_coef[block])
                    ce = chunk.rows[block].add_cross_entropy_(by_logits, log_probs, softmax)
                    chunk_sums += chunk.rows[block].weighted(ce, kd)
                gradients.add(chunk.places, chunk.states, chunk.logits, student.weight, teacher.by_states)
                sums += chunk_sums
        if part is not None:
            sums, gradients = sums / part.group.size(), gradients.of_rows(part, len(inputs[0]))
    total = KnownGradients.apply(sums[0] + sums[1], gradients, *inputs)
    return FusedLoss(total, sums[0], sums[1], len(index))


def _reader(
    targets: OneTeacherTargets | None, kd_coef: Tensor, vocab: int, distance: Distance, terms: Terms | None
) -> TargetReader:
    if not (bool((kd_coef != 0).any()) if terms is None else terms.kd):
        return TargetReader()
    if targets is None:
        raise ShapeError("fused_loss: kd_coef is not 0 but targets is None; give targets, or kd_coef 0.")
    return targets.reader(kd_coef, vocab, distance)


def _check_projected(gradients: Gradients, divergence: DivergenceConfig) -> None:
    if gradients.weight is not None or gradients.bias is not None or divergence.name != "forward_kl":
        raise ConfigError(
            "fused_loss: projected targets hold for forward_kl and a head that is not trained; found "
            f"{divergence.name}{'' if gradients.weight is None else ' and a head that is'}."
        )


class _Chunk(NamedTuple):
    """Rows whose logits exist together."""

    places: Tensor
    """Which rows of all."""
    rows: Rows
    states: Tensor
    """[C D]."""
    logits: Tensor
    """[C V], overwritten with their gradient."""


def _chunks(
    index: Tensor, student: ChunkedLogits, teacher: TargetReader, rows: Rows, chunk_bytes: int
) -> Iterator[_Chunk]:
    """The rows `index`, as many at a time as the budget holds; the teacher's reader stands at the same."""
    limit = chunk_bytes // (student.row_bytes + teacher.row_bytes)
    if student.buffer.device.type == "cpu":
        limit = min(limit, CPU_CHUNK_ROWS)
    size = _even_parts(len(index), limit)
    student.allocate(size)
    teacher.allocate(size)
    for part in (index[start : start + size] for start in range(0, len(index), size)):
        states = student.states(part)
        logits = student.logits(states)
        teacher.read(part, states)
        yield _Chunk(part, rows[part], states, logits)


def _blocks(
    student: ChunkedLogits, logits: Tensor, compute: torch.dtype, part: ShardedSoftmax | None
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a chunk, as many at a time as stay in cache; all at once where processes must keep step.

    Yields: which rows, and their logits in the compute type; what these are overwritten with goes into `logits`.
    """
    size = len(logits)
    if part is None:
        row_bytes = logits.shape[1] * compute.itemsize
        on_cpu = logits.device.type == "cpu"
        size = max(1, (CPU_BLOCK_BYTES if on_cpu else DEVICE_BLOCK_BYTES) // row_bytes)
        size *= torch.get_num_threads() if on_cpu else 1
    for start in range(0, len(logits), size):
        block = slice(start, start + size)
        finished = student.finish(logits[block], compute)
        slope = student.slope(finished)
        yield block, finished
        if slope is not None:
            finished.mul_(slope)
        if finished.dtype != logits.dtype:
            logits[block] = finished


def _even_parts(length: int, limit: int) -> int:
    """The size of equal parts of `length` that are at most `limit` long, and at least 1."""
    parts = -(-length // max(1, limit))
    return -(-length // max(1, parts)) or 1
