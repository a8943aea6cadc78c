"""CE and KD of a block of rows, from their logits to the gradient by these logits: closed forms, no graph.

`row_loss` overwrites the logits with d(ce_coef CE + kd_coef D) / d logits. `fused` feeds it blocks of rows
that are small enough for their temporaries to stay in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.distill.divergence import LOG_FLOOR, Divergence
from limbeck.distill.rows import Rows
from limbeck.teacher.targets import TopKTargets


def row_loss(
    logits: Tensor, teacher_logits: Tensor | None, rows: Rows, divergence: Divergence, temperature: float
) -> tuple[Tensor, Tensor]:
    """CE and D of each row; `logits` becomes the gradient of ce_coef CE + kd_coef D by them.

    Args:
        logits: [n V] at temperature 1, of the compute type; overwritten.
        teacher_logits: [n W] with W <= V for a dense teacher: D is over the first W entries. None otherwise.
        rows: labels, coefficients and top-k targets of the same rows.
        divergence: D of log-probabilities.
        temperature: T > 0, of D only.

    Returns: CE [n] and D [n]; zeros for a term that is absent.
    """
    ce = kd = logits.new_zeros(len(logits))
    log_probs = None if rows.labels is None else torch.log_softmax(logits, -1)
    if rows.topk is not None:
        kd = _topk(logits, rows.topk, rows.kd_coef, divergence, temperature)
    elif teacher_logits is not None:
        kd = _dense(logits, teacher_logits, log_probs, rows.kd_coef, divergence, temperature)
    else:
        logits.zero_()
    if log_probs is not None and rows.labels is not None:
        ce = -log_probs.gather(1, rows.labels).squeeze(1)
        logits.addcmul_(log_probs.exp_(), rows.ce_coef)
        logits.scatter_add_(1, rows.labels, -rows.ce_coef)
    return ce, kd


def _dense(
    logits: Tensor,
    teacher_logits: Tensor,
    log_probs: Tensor | None,
    coef: Tensor,
    divergence: Divergence,
    temperature: float,
) -> Tensor:
    """D [n] over the common vocabulary; `logits` becomes coef * dD / dlogits, 0 beyond it."""
    common = logits[:, : teacher_logits.shape[1]]
    if log_probs is not None and temperature == 1.0 and common.shape == logits.shape:
        log_student = log_probs
    else:
        log_student = _log_softmax(common, temperature)
    value, gradient = divergence(log_student, _log_softmax(teacher_logits, temperature))
    _by_logits(gradient, log_student)
    torch.mul(gradient, coef / temperature, out=common)
    logits[:, common.shape[1] :] = 0.0
    return value


def _topk(logits: Tensor, targets: TopKTargets, coef: Tensor, divergence: Divergence, temperature: float) -> Tensor:
    """D [n] over K + 1 events, the kept entries and the rest; `logits` becomes coef * dD / dlogits.

    The log-mass of the rest is the log-sum-exp of the row without the kept entries: exact, however small. Padding (a
    teacher's log-probability of -inf) is an event that neither of the two can have.
    """
    kept = logits.gather(1, targets.ids).masked_fill_(targets.log_probs == -torch.inf, -torch.inf)
    rest = logits.scatter_(1, targets.ids, -torch.inf)
    log_rest = torch.logsumexp(rest, -1, keepdim=True)
    log_student = _log_softmax(torch.cat([kept, log_rest], 1), temperature)
    log_teacher = _log_softmax(torch.cat([targets.log_probs, targets.log_tail[:, None]], 1), temperature)
    value, gradient = divergence(log_student, log_teacher)
    gradient = _by_logits(gradient, log_student).mul_(coef / temperature)
    # An entry has its share exp(z - log_rest) of the rest's gradient. With K = V there is none, and no NaN.
    rest.sub_(log_rest.clamp(min=LOG_FLOOR)).exp_().mul_(gradient[:, -1:])
    # The kept places hold 0 now; padding adds its 0 to a place that another entry of the row fills.
    logits.scatter_add_(1, targets.ids, gradient[:, :-1])
    return value


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


def _by_logits(gradient: Tensor, log_probs: Tensor) -> Tensor:
    """From the derivative by log-probabilities to the one by the logits behind them, in place."""
    return gradient.addcmul_(log_probs.exp(), gradient.sum(-1, keepdim=True), value=-1.0)
