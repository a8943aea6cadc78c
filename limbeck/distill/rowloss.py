"""CE and KD of a block of rows, from their logits to the gradient by these logits: closed forms, no graph.

`row_loss` overwrites the logits with d(ce_coef CE + kd_coef D) / d logits. `fused` feeds it blocks of rows
that are small enough for their temporaries to stay in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.distill.divergence import LOG_FLOOR, Divergence
from limbeck.distill.rows import Rows
from limbeck.distill.vocabulary import WHOLE, Vocabulary
from limbeck.teacher.targets import TopKTargets


def row_loss(
    logits: Tensor,
    teacher_logits: Tensor | None,
    rows: Rows,
    divergence: Divergence,
    temperature: float,
    vocabulary: Vocabulary = WHOLE,
) -> tuple[Tensor, Tensor]:
    """CE and D of each row; `logits` becomes the gradient of ce_coef CE + kd_coef D by them.

    Args:
        logits: [n V] at temperature 1, of the compute type; overwritten.
        teacher_logits: [n W] with W <= V for a dense teacher: D is over the first W entries. None otherwise.
        rows: labels, coefficients and top-k targets of the same rows.
        divergence: D of log-probabilities.
        temperature: T > 0, of D only.
        vocabulary: of which the logits are, or a part of it, which the teacher's logits then have whole.

    Returns: CE [n] and D [n]; zeros for a term that is absent.
    """
    ce = kd = logits.new_zeros(len(logits))
    log_probs = None if rows.labels is None else vocabulary.log_softmax(logits)
    if rows.topk is not None:
        kd = _topk(logits, rows.topk, rows.kd_coef, divergence, temperature, vocabulary)
    elif teacher_logits is not None:
        kd = _dense(logits, teacher_logits, log_probs, rows.kd_coef, divergence, temperature, vocabulary)
    else:
        logits.zero_()
    if log_probs is not None and rows.labels is not None:
        ce = -vocabulary.gather(log_probs, rows.labels).squeeze(1)
        logits.addcmul_(log_probs.exp_(), rows.ce_coef)
        vocabulary.scatter_add_(logits, rows.labels, -rows.ce_coef)
    return ce, kd


def _dense(
    logits: Tensor,
    teacher_logits: Tensor,
    log_probs: Tensor | None,
    coef: Tensor,
    divergence: Divergence,
    temperature: float,
    vocabulary: Vocabulary,
) -> Tensor:
    """D [n] over the common vocabulary; `logits` becomes coef * dD / dlogits, 0 beyond it."""
    common = logits[:, : teacher_logits.shape[1]]
    if log_probs is not None and temperature == 1.0 and common.shape == logits.shape:
        log_student = log_probs
    else:
        log_student = vocabulary.log_softmax(_cooled(common, temperature))
    value, gradient = divergence(log_student, vocabulary.log_softmax(_cooled(teacher_logits, temperature)))
    _by_logits(gradient, log_student, vocabulary)
    torch.mul(gradient, coef / temperature, out=common)
    logits[:, common.shape[1] :] = 0.0
    return vocabulary.sum(value)


def _topk(
    logits: Tensor,
    targets: TopKTargets,
    coef: Tensor,
    divergence: Divergence,
    temperature: float,
    vocabulary: Vocabulary,
) -> Tensor:
    """D [n] over K + 1 events, the kept entries and the rest; `logits` becomes coef * dD / dlogits.

    The log-mass of the rest is the log-sum-exp of the row without the kept entries: exact, however small. Padding (a
    teacher's log-probability of -inf) is an event that neither of the two can have.
    """
    kept = vocabulary.gather(logits, targets.ids).masked_fill_(targets.log_probs == -torch.inf, -torch.inf)
    vocabulary.exclude_(logits, targets.ids)
    log_rest = vocabulary.log_sum_exp(logits)
    events = torch.cat([kept, log_rest], 1)
    log_student = torch.log_softmax(_cooled(events, temperature), -1)
    events = torch.cat([targets.log_probs, targets.log_tail[:, None]], 1)
    log_teacher = torch.log_softmax(_cooled(events, temperature), -1)
    value, gradient = divergence(log_student, log_teacher)
    gradient = _by_logits(gradient, log_student, WHOLE).mul_(coef / temperature)
    # An entry has its share exp(z - log_rest) of the rest's gradient. With K = V there is none, and no NaN.
    logits.sub_(log_rest.clamp(min=LOG_FLOOR)).exp_().mul_(gradient[:, -1:])
    # The kept places hold 0 now; padding adds its 0 to a place that another entry of the row fills.
    vocabulary.scatter_add_(logits, targets.ids, gradient[:, :-1])
    return value


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _by_logits(gradient: Tensor, log_probs: Tensor, vocabulary: Vocabulary) -> Tensor:
    """From the derivative by log-probabilities to the one by the logits behind them, in place."""
    total = vocabulary.sum(gradient.sum(-1, keepdim=True))
    return gradient.addcmul_(log_probs.exp(), total, value=-1.0)
