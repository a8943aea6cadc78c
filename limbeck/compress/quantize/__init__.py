"""Quantisation: one solver a file, all for the same problem.

Example:
    import torch
    from limbeck.compress import LayerProblem, Moments, layer_error
    from limbeck.compress.quantize import AwqConfig, GptqConfig, Grid, awq_factors, solve_gptq

    problem, grid = LayerProblem(torch.randn(16, 32), Moments.of(torch.randn(200, 32))), Grid(bits=4, group_size=16)
    layer_error(problem, solve_gptq(problem, grid, GptqConfig()).dequantize())
    awq_factors([problem], grid, AwqConfig())
"""

from limbeck.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "AwqConfig": "awq",
        "GptqConfig": "gptq",
        "Grid": "grid",
        "JointConfig": "joint",
        "MixedConfig": "budget",
        "QuantEaseConfig": "quantease",
        "QuantizeConfig": "stage",
        "Quantized": "grid",
        "RtnConfig": "rtn",
        "SmoothQuantConfig": "smoothquant",
        "awq_factors": "awq:factors",
        "smoothquant_factors": "smoothquant:factors",
        "solve_gptq": "gptq:solve",
        "solve_joint": "joint:solve",
        "solve_quantease": "quantease:solve",
        "solve_rtn": "rtn:solve",
    },
)
