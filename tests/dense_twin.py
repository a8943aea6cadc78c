"""The plain, obvious loss that the fused one must equal: a row at a time, formulas as documented, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.distill.divergence import DivergenceConfig
from limbeck.teacher.dense import DenseTargets
from limbeck.teacher.targets import TeacherTargets
from limbeck.teacher.topk import TopKTargets


def twin_loss(
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
) -> Tensor:
    """sum_i ce_coef_i CE_i + kd_coef_i T^2 D_i."""
    logits = (hidden @ head_weight.T + (0.0 if head_bias is None else head_bias))[:, :vocab_size]
    total = hidden.sum() * 0.0
    for i in range(len(hidden)):
        if ce_coef[i] != 0:
            total = total - ce_coef[i] * torch.log_softmax(logits[i], -1)[labels[i]]
        if kd_coef[i] != 0:
            student, teacher = distributions(logits[i], targets, i, temperature)
            scale = temperature**2 if scale_by_temperature_squared else 1.0
            total = total + kd_coef[i] * scale * twin_divergence(student, teacher, divergence)
    return total


def distributions(logits: Tensor, targets: TeacherTargets, i: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities that D compares at row i."""
    if isinstance(targets, DenseTargets):
        bias = 0.0 if targets.head_bias is None else targets.head_bias
        teacher_logits = targets.hidden[i] @ targets.head_weight.T + bias
        common = min(len(logits), len(teacher_logits))
        return (
            torch.log_softmax(logits[:common] / temperature, -1),
            torch.log_softmax(teacher_logits[:common] / temperature, -1),
        )
    assert isinstance(targets, TopKTargets)
    log_probs = torch.log_softmax(logits, -1)
    real = targets.log_probs[i] > -torch.inf
    ids = targets.ids[i][real]
    kept = torch.zeros(len(logits), dtype=torch.bool)
    kept[ids] = True
    student, teacher = log_probs[ids], targets.log_probs[i][real]
    if not kept.all():
        student = torch.cat([student, log_probs[~kept].logsumexp(0, keepdim=True)])
        teacher = torch.cat([teacher, targets.log_tail[i : i + 1]])
    return torch.log_softmax(student / temperature, -1), torch.log_softmax(teacher / temperature, -1)


def twin_divergence(log_student: Tensor, log_teacher: Tensor, config: DivergenceConfig) -> Tensor:
    """D from two vectors of log-probabilities, by its definition."""
    s, t = log_student.exp(), log_teacher.exp()

    def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum()

    def log_mix(share: float, p: Tensor, q: Tensor) -> Tensor:
        return (share * p + (1 - share) * q).log()

    beta, alpha, rho = config.beta, config.skew_alpha, config.forward_ratio
    match config.name:
        case "forward_kl":
            return kl(t, log_teacher, log_student)
        case "reverse_kl":
            return kl(s, log_student, log_teacher)
        case "jsd":
            mixture = log_mix(beta, t, s)
            return (1 - beta) * kl(t, log_teacher, mixture) + beta * kl(s, log_student, mixture)
        case "skew_kl":
            return kl(t, log_teacher, log_mix(alpha, t, s))
        case "skew_reverse_kl":
            return kl(s, log_student, log_mix(alpha, s, t))
        case "tvd":
            return (s - t).abs().sum() / 2
        case "combined_kl":
            return rho * kl(t, log_teacher, log_student) + (1 - rho) * kl(s, log_student, log_teacher)
    raise AssertionError(config.name)
