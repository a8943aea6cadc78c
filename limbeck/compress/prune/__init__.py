"""Pruning: one solver a file, all for the same problem.

Example:
    import torch
    from limbeck.compress import LayerProblem, Moments, layer_error
    from limbeck.compress.prune import OsscarConfig, Pattern, WandaConfig, solve_osscar, solve_wanda

    problem = LayerProblem(torch.randn(16, 32), Moments.of(torch.randn(200, 32)))
    layer_error(problem, solve_wanda(problem, Pattern.parse(0.5), WandaConfig()))
    solve_osscar(problem, group_size=1, keep=24, config=OsscarConfig()).groups
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "AlpsConfig": "alps",
        "MagnitudeConfig": "magnitude",
        "OsscarConfig": "osscar",
        "Pattern": "pattern",
        "PruneConfig": "stage",
        "RefitConfig": "refit",
        "SparseGptConfig": "sparsegpt",
        "WandaConfig": "wanda",
        "refit_weight": "refit:refit",
        "solve_alps": "alps:solve",
        "solve_magnitude": "magnitude:solve",
        "solve_osscar": "osscar:solve",
        "solve_sparsegpt": "sparsegpt:solve",
        "solve_wanda": "wanda:solve",
    },
)
