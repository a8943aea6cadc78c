"""Pruning, quantisation and export: models in, smaller models out.

`limbeck.prune(...)`, `limbeck.quantize(...)`, `limbeck.recover(...)` and `limbeck.export(...)` go through a model; the
solvers of a single layer are in `limbeck.compress.prune` and `limbeck.compress.quantize`.

Example:
    import torch
    from limbeck.compress import LayerProblem, Moments, layer_error
    from limbeck.compress.prune import AlpsConfig, Pattern, solve_alps

    problem = LayerProblem(torch.randn(16, 32), Moments.of(torch.randn(200, 32)))
    layer_error(problem, solve_alps(problem, Pattern.parse("2:4"), AlpsConfig()))
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "BudgetConfig": "budget",
        "CalibrationConfig": "calibrate",
        "GateConfig": "fidelity",
        "LayerProblem": "problem",
        "Moments": "problem",
        "RecoverConfig": "recover",
        "calibration_rows": "calibrate",
        "layer_error": "problem",
        "predict_prune": "predict",
        "predict_quantize": "predict",
        "predict_recover": "predict",
        "read_masks": "masks",
        "retarget": "problem",
        "walk_layers": "walk:walk",
    },
)
