"""The loss of a chunk of rows on an accelerator, by the kernels where they compute what is asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from limbeck.distill.divergence import DivergenceConfig
from limbeck.distill.rows import Rows
from limbeck.models.logits import ChunkedLogits
from limbeck.models.sharded_softmax import WHOLE, ShardedSoftmax
from limbeck.teacher.targets import LOG_FLOOR, TargetReader, by_logits_, cooled
from limbeck.teacher.topk import TopKTargets


@functools.cache
def kernels() -> Any:
    """The module of the kernels; None where there is no Triton, or no accelerator for it."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("limbeck.distill.kernels")


def takes(student: ChunkedLogits, teacher: TargetReader, compute: torch.dtype, part: ShardedSoftmax | None) -> bool:
    """Whether `chunk_loss_` computes such rows: whole, plain logits of both sides, in float32 sums."""
    is_plain = student.bias is None and student.softcap is None and (teacher.is_plain or type(teacher) is TargetReader)
    fits = compute == torch.float32 and part is None and teacher.width <= len(student.weight)
    return student.weight.is_cuda and is_plain and fits and kernels() is not None


def chunk_loss_(
    logits: Tensor, rows: Rows, teacher: TargetReader, divergence: DivergenceConfig, temperature: float
) -> Tensor:
    """The two sums [2] of coefficient times value; the logits [n V] become their gradient."""
    if teacher.dense is not None:
        labels = None if rows.labels is None else rows.labels[:, 0]
        kind, numbers = kernels().KINDS[divergence.name], numbers_of(divergence)
        coefs = rows.ce_coef[:, 0].contiguous(), rows.kd_coef[:, 0].contiguous()
        ce, kd = kernels().dense_loss_(logits, teacher.dense, labels, *coefs, kind, numbers, temperature)
    elif teacher.kept is not None:
        ce, kd = _topk_loss_(logits, rows, teacher.kept, divergence, temperature)
    else:
        kd = rows.kd_coef.new_zeros(len(logits))
        ce = _cross_entropy_(logits, rows)
    return rows.weighted(ce, kd)


def numbers_of(divergence: DivergenceConfig) -> tuple[float, float, float]:
    """A divergence's parameter, and the log weights of student and teacher in its mixture."""
    if divergence.name == "jsd":
        return divergence.beta, _log(1 - divergence.beta), _log(divergence.beta)
    if divergence.name == "skew_kl":
        return divergence.skew_alpha, _log(1 - divergence.skew_alpha), _log(divergence.skew_alpha)
    if divergence.name == "skew_reverse_kl":
        return divergence.skew_alpha, _log(divergence.skew_alpha), _log(1 - divergence.skew_alpha)
    return (divergence.forward_ratio if divergence.name == "combined_kl" else 0.0), 0.0, 0.0


def _cross_entropy_(logits: Tensor, rows: Rows) -> Tensor:
    assert rows.labels is not None
    log_sum, own = kernels().log_sums_of(logits), logits.gather(1, rows.labels)[:, 0].float()
    ce_coef = rows.ce_coef[:, 0].contiguous()
    kernels().two_terms_(logits, log_sum, log_sum, ce_coef, torch.zeros_like(ce_coef))
    logits.scatter_add_(1, rows.labels, -rows.ce_coef.to(logits.dtype))
    return log_sum - own


def _topk_loss_(
    logits: Tensor, rows: Rows, targets: TopKTargets, divergence: DivergenceConfig, temperature: float
) -> tuple[Tensor, Tensor]:
    """As `teacher.topk` has it: D over the kept entries and the rest, whose log-sum-exp is the kernel's."""
    own = None if rows.labels is None else logits.gather(1, rows.labels)[:, 0].float()
    is_padding = targets.log_probs == -torch.inf
    kept = logits.gather(1, targets.ids).float().masked_fill(is_padding, -torch.inf)
    logits.scatter_(1, targets.ids, -torch.inf)
    rest = kernels().log_sums_of(logits)[:, None]
    events = torch.cat([kept, rest], 1)
    log_student = torch.log_softmax(cooled(events, temperature), -1)
    log_teacher = torch.log_softmax(cooled(targets.events(), temperature), -1)
    kd, gradient = divergence.bind()(log_student, log_teacher)
    gradient = by_logits_(gradient, log_student, WHOLE).mul_(rows.kd_coef / temperature)
    log_sum, ce_coef = torch.logsumexp(events, 1), rows.ce_coef[:, 0].contiguous()
    # An entry has its share exp(z - rest) of the rest's gradient; with K = V there is none, and no NaN.
    floor = rest[:, 0].clamp(min=LOG_FLOOR)
    kernels().two_terms_(logits, log_sum, floor, ce_coef, gradient[:, -1].contiguous())
    probabilities = (kept - log_sum[:, None]).exp()
    logits.scatter_add_(1, targets.ids, (gradient[:, :-1] + rows.ce_coef * probabilities).to(logits.dtype))
    if own is None or rows.labels is None:
        return kd.new_zeros(len(kd)), kd
    logits.scatter_add_(1, rows.labels, -rows.ce_coef.to(logits.dtype))
    return log_sum - own, kd


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf
