"""Optimizers of the Langevin family, samplers, noise for any optimizer, and growing batches.

Example:
    import torch
    from limbeck.optim import ASGLD, Perturb

    model = torch.nn.Linear(3, 1)
    optimizer = ASGLD(model.named_parameters(), lr=0.1, grad_threshold=1e-2)
    noisy = Perturb(torch.optim.AdamW(model.parameters()), grad_threshold=1e-2, noise_radius=1e-3)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "AGLD": "langevin",
        "ASG": "langevin",
        "ASGLD": "langevin",
        "AccumulationSchedule": "growing_batch",
        "BatchGrowth": "growing_batch",
        "CyclicalSampling": "cyclical",
        "EqualLR": "growing_batch",
        "GrowingBatchSampler": "growing_batch",
        "NEON": "neon",
        "NoisySGD": "perturbed",
        "OptimizerConfig": "build",
        "PSGLD": "psgld",
        "Perturb": "perturb",
        "PerturbedGD": "perturbed",
        "PerturbedSGD": "perturbed",
        "RankSquares": "ranks",
        "SAM": "sam",
        "SGHMC": "sghmc",
        "SGLD": "sgld",
        "SGNHT": "sgnht",
        "ScheduleConfig": "schedules",
        "build_optimizer": "build",
        "jitter_": "jitter",
        "second_order": "diagnostics",
    },
)
