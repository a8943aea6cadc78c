"""How far the student's next-token distribution is from the teacher's: pure mathematics, one signature.

    divergence(log_student [N V], log_teacher [N V]) -> (value [N], gradient [N V])

`gradient` is the partial derivative of the value by each student log-probability, the teacher held fixed. By
the student's logits z, log_student = log_softmax(z), it is `gradient - p * gradient.sum(-1)` with
p = exp(log_student): a closed form, so that no graph is ever kept.

With s and t the two distributions and every sum over the vocabulary:

    forward_kl        KL(t || s)                               0 at s = t
    reverse_kl        KL(s || t)
    jsd               (1 - beta) KL(t || m) + beta KL(s || m),  m = beta t + (1 - beta) s
    skew_kl           KL(t || alpha t + (1 - alpha) s)
    skew_reverse_kl   KL(s || alpha s + (1 - alpha) t)
    tvd               1/2 sum |s - t|
    combined_kl       rho KL(t || s) + (1 - rho) KL(s || t)

Convention of `jsd`. GKD (arXiv 2306.13649, eq. 1), TRL and Liger take the same mixture m but weigh the two
terms the other way round, beta KL(t || m) + (1 - beta) KL(s || m). That tends to 0 at both ends, so TRL and
Liger put KL(t || s) and KL(s || t) there: a jump (12.98 at beta 0, 0.05 at beta 0.01 in one probe). Here each
weight sits on the term that survives at its end: the value is KL(t || s) at beta 0 and KL(s || t) at beta 1
by the formula itself, continuous in between, and at beta 1/2 the plain Jensen-Shannon divergence, as theirs is.

Zeros. A log-probability below LOG_FLOOR, -inf included, counts as LOG_FLOOR: its probability is exactly 0 in
every float type, so it adds nothing as a weight (0 log 0 = 0), and where it stands alone inside a logarithm
(a reverse KL against an entry that the teacher excludes) the value is large instead of infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from limbeck.config import checked, only
from limbeck.errors import ConfigError, nearest
from limbeck.teacher.targets import LOG_FLOOR, Divergence

DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "combined_kl"
]  # fmt: skip


@checked
class DivergenceConfig:
    """Which divergence, and its parameters."""

    name: DivergenceName = "forward_kl"
    """Divergence between teacher and student at a supervised token."""
    beta: float = only("name", "jsd", default=0.5)
    """In [0, 1]: 0 is forward KL, 1 is reverse KL, 0.5 the Jensen-Shannon divergence."""
    skew_alpha: float = only("name", "skew_kl", "skew_reverse_kl", default=0.1)
    """In [0, 1): share of the first distribution in the mixture."""
    forward_ratio: float = only("name", "combined_kl", default=0.5)
    """In [0, 1]: weight of forward KL; reverse KL has the rest."""

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            raise ConfigError(f"divergence: unknown name {self.name!r}; {nearest(str(self.name), DIVERGENCES)}")
        for field, closed in (("beta", True), ("forward_ratio", True), ("skew_alpha", False)):
            value = getattr(self, field)
            if not (0.0 <= value < 1.0 or (closed and value == 1.0)):
                raise ConfigError(
                    f"divergence: {field} is {value}; expected a number in [0, 1{']' if closed else ')'}."
                )

    def bind(self) -> Divergence:
        """The divergence with this config's parameters set."""
        return DIVERGENCES[self.name](self)


def forward_kl(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(t || s), a true KL: the teacher's entropy is in it, so it is 0 at s = t.

    Args:
        log_student: [N V] log-probabilities.
        log_teacher: [N V] log-probabilities.

    Returns: value [N]; gradient [N V] = -t.
    """
    log_student, log_teacher = _finite(log_student), _finite(log_teacher)
    teacher = log_teacher.exp()
    value = _dot(teacher, log_teacher - log_student)
    return value, teacher.neg_()


def reverse_kl(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(s || t).

    Args:
        log_student: [N V] log-probabilities.
        log_teacher: [N V] log-probabilities.

    Returns: value [N]; gradient [N V] = s (log s - log t + 1).
    """
    log_student, log_teacher = _finite(log_student), _finite(log_teacher)
    student, log_ratio = log_student.exp(), log_student - log_teacher
    return _dot(student, log_ratio), log_ratio.add_(1.0).mul_(student)


def jsd(log_student: Tensor, log_teacher: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """(1 - beta) KL(t || m) + beta KL(s || m) with m = beta t + (1 - beta) s.

    Args:
        log_student: [N V] log-probabilities.
        log_teacher: [N V] log-probabilities.
        beta: in [0, 1]; 0 is forward KL, 1 is reverse KL, 1/2 is bounded by log 2.

    Returns: value [N]; gradient [N V] = beta s (log s - log m + 1) - r ((1 - beta) t + beta s), where
        r = (1 - beta) s / m is the student's share of the mixture.

    Source: Agarwal et al., GKD, arXiv 2306.13649, eq. 1, with the two weights exchanged (see above).
    """
    log_student, log_teacher = _finite(log_student), _finite(log_teacher)
    log_mixture, share = _mixture(log_student, log_teacher, student_weight=1.0 - beta)
    student, teacher = log_student.exp(), log_teacher.exp()
    student_ratio = log_student - log_mixture
    value = (1.0 - beta) * _dot(teacher, log_mixture.neg_().add_(log_teacher)) + beta * _dot(student, student_ratio)
    gradient = student_ratio.add_(1.0).sub_(share).mul_(student).mul_(beta)
    return value, gradient.sub_(share.mul_(teacher).mul_(1.0 - beta))


def skew_kl(log_student: Tensor, log_teacher: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(t || alpha t + (1 - alpha) s).

    Args:
        log_student: [N V] log-probabilities.
        log_teacher: [N V] log-probabilities.
        alpha: in [0, 1); 0 is forward KL.

    Returns: value [N]; gradient [N V] = -t r, where r = (1 - alpha) s / m is the student's share of m.

    Source: Ko et al., DistiLLM, arXiv 2402.03898, section 3.1.
    """
    log_student, log_teacher = _finite(log_student), _finite(log_teacher)
    log_mixture, share = _mixture(log_student, log_teacher, student_weight=1.0 - alpha)
    teacher = log_teacher.exp()
    return _dot(teacher, log_mixture.neg_().add_(log_teacher)), share.mul_(teacher).neg_()


def skew_reverse_kl(log_student: Tensor, log_teacher: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(s || alpha s + (1 - alpha) t).

    Args:
        log_student: [N V] log-probabilities.
        log_teacher: [N V] log-probabilities.
        alpha: in [0, 1); 0 is reverse KL.

    Returns: value [N]; gradient [N V] = s (log s - log m + 1 - r), where r = alpha s / m.

    Source: Ko et al., DistiLLM, arXiv 2402.03898, section 3.1.
    """
    log_student, log_teacher = _finite(log_student), _finite(log_teacher)
    log_mixture, share = _mixture(log_student, log_teacher, student_weight=alpha)
    student = log_student.exp()
    log_ratio = log_mixture.neg_().add_(log_student)
    return _dot(student, log_ratio), log_ratio.add_(1.0).sub_(share).mul_(student)


def tvd(log_student: Tensor, log_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Total variation distance 1/2 sum |s - t|, in [0, 1]; its gradient is 0 where s = t.

    Args:
        log_student: [N V] log-probabilities.
        log_teacher: [N V] log-probabilities.

    Returns: value [N]; gradient [N V] = 1/2 s sign(s - t).
    """
    student = log_student.exp()
    difference = student - log_teacher.exp()
    value = 0.5 * difference.abs().sum(-1)
    return value, difference.sign_().mul_(student).mul_(0.5)


def combined_kl(log_student: Tensor, log_teacher: Tensor, *, forward_ratio: float) -> tuple[Tensor, Tensor]:
    """forward_ratio KL(t || s) + (1 - forward_ratio) KL(s || t).

    Args:
        log_student: [N V] log-probabilities.
        log_teacher: [N V] log-probabilities.
        forward_ratio: in [0, 1].

    Returns: value [N]; gradient [N V], the same mix of the two gradients.
    """
    forward_value, forward_gradient = forward_kl(log_student, log_teacher)
    reverse_value, reverse_gradient = reverse_kl(log_student, log_teacher)
    return torch.lerp(reverse_value, forward_value, forward_ratio), reverse_gradient.lerp_(
        forward_gradient, forward_ratio
    )


DIVERGENCES: dict[str, Callable[[DivergenceConfig], Divergence]] = {
    "forward_kl": lambda config: forward_kl,
    "reverse_kl": lambda config: reverse_kl,
    "jsd": lambda config: partial(jsd, beta=config.beta),
    "skew_kl": lambda config: partial(skew_kl, alpha=config.skew_alpha),
    "skew_reverse_kl": lambda config: partial(skew_reverse_kl, alpha=config.skew_alpha),
    "tvd": lambda config: tvd,
    "combined_kl": lambda config: partial(combined_kl, forward_ratio=config.forward_ratio),
}
"""From a divergence's name to the function that binds its parameters."""


def _finite(log_probs: Tensor) -> Tensor:
    return log_probs.clamp(min=LOG_FLOOR)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)


def _mixture(log_student: Tensor, log_teacher: Tensor, *, student_weight: float) -> tuple[Tensor, Tensor]:
    """log(w s + (1 - w) t), and the student's share w s / (w s + (1 - w) t), in [0, 1] at both ends of w."""
    weighted_student = log_student + _log(student_weight)
    log_mixture = torch.logaddexp(weighted_student, log_teacher + _log(1.0 - student_weight))
    return log_mixture, weighted_student.sub_(log_mixture).exp_()


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0.0 else -math.inf
