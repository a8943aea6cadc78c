"""Distillation: the loss, the objective and the training loop; `limbeck.distill(...)` trains one student.

Example:
    import torch
    from limbeck.distill import DivergenceConfig, fused_loss
    from limbeck.teacher import DenseTargets

    hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8)
    loss = fused_loss(
        hidden, head, labels=torch.zeros(6, dtype=torch.long), ce_coef=torch.zeros(6), kd_coef=torch.full((6,), 1 / 6),
        targets=DenseTargets(torch.randn(6, 16), torch.randn(40, 16)), divergence=DivergenceConfig(name="jsd"),
    )
    loss.total.backward()
"""

from limbeck.lazy import lazy, make_callable

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "DistillConfig": "config",
        "DivergenceConfig": "divergence",
        "FusedLoss": "fused",
        "LoraConfig": "config",
        "LossConfig": "config",
        "OnPolicyConfig": "on_policy",
        "ParallelConfig": "parallel",
        "SourceConfig": "config",
        "StudentConfig": "config",
        "TeacherConfig": "config",
        "TrainingConfig": "config",
        "combined_kl": "divergence",
        "forward_kl": "divergence",
        "fused_loss": "fused",
        "jsd": "divergence",
        "plan_steps": "plan",
        "predict_distill": "predict",
        "reverse_kl": "divergence",
        "skew_kl": "divergence",
        "skew_reverse_kl": "divergence",
        "tvd": "divergence",
    },
)
make_callable(__name__)
