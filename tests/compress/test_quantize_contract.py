"""What every rounding method keeps, whatever it is given."""

from dataclasses import replace

import pytest
import torch

from limbeck.compress.problem import LayerProblem, Moments, layer_error
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.quantize import awq, gptq, joint, quantease, rtn, smoothquant
from limbeck.compress.quantize.awq import AwqConfig
from limbeck.compress.quantize.gptq import GptqConfig
from limbeck.compress.quantize.grid import Grid
from limbeck.compress.quantize.joint import JointConfig
from limbeck.compress.quantize.quantease import QuantEaseConfig
from limbeck.compress.quantize.rtn import RtnConfig
from limbeck.compress.quantize.smoothquant import SmoothQuantConfig
from limbeck.errors import CompressionError, ConfigError

SOLVERS = {
    "rtn": lambda p, g: rtn.solve(p, g, RtnConfig()),
    "rtn-clipped": lambda p, g: rtn.solve(p, g, RtnConfig(clip="moments")),
    "gptq": lambda p, g: gptq.solve(p, g, GptqConfig()),
    "gptq-plain": lambda p, g: gptq.solve(p, g, GptqConfig(clip="none", ordered=False)),
    "quantease": lambda p, g: quantease.solve(p, g, QuantEaseConfig()),
    "quantease-from-rtn": lambda p, g: quantease.solve(p, g, QuantEaseConfig(start="rtn", clip="none")),
    "joint": lambda p, g: joint.solve(p, g, JointConfig(), pattern=Pattern.parse("0.25")),
}
FACTORS = {
    "awq": lambda ps, g: awq.factors(ps, g, AwqConfig()),
    "smoothquant": lambda ps, g: smoothquant.factors(ps, g, SmoothQuantConfig(alpha=0.8)),
}
GRIDS = {
    "int4-group": Grid(bits=4, group_size=16),
    "int3-channel": Grid(bits=3, group_size=None),
    "int8-63": Grid(bits=8, group_size=None, largest_code=63),
    "fp8": Grid(bits=8, kind="float", group_size=None),
    "nvfp4": Grid(kind="float", group_size=16, scale_dtype=torch.float8_e4m3fn, global_scale=600.0),
    "mxfp4": Grid(kind="float", group_size=16, scale_dtype=torch.float8_e8m0fnu),
}


def layer(tokens=200, outputs=24, inputs=48, dead=()):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 12, generator=draw) @ torch.randn(12, inputs, generator=draw)
    x = x + 0.3 * torch.randn(tokens, inputs, generator=draw)
    x[:, 7] *= 20
    x[:, list(dead)] = 0
    return LayerProblem(torch.randn(outputs, inputs, generator=draw), Moments.of(x), "block.0.proj")


def check(problem, quantized, grid):
    assert quantized.grid == grid
    assert quantized.codes.shape == problem.weight.shape
    assert quantized.codes.dtype == (torch.int8 if grid.kind == "int" else torch.float8_e4m3fn)
    assert quantized.scales.shape == (len(problem.weight), grid.groups(problem.weight.shape[1]))
    assert quantized.scales.dtype == torch.float32
    assert torch.isfinite(quantized.dequantize()).all() and (quantized.scales > 0).all()
    codes = quantized.codes.float()
    assert codes.min() >= grid.range[0] and codes.max() <= grid.range[1]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
class TestSolvers:
    def test_shapes_range_and_a_small_error(self, solve, grid):
        problem = layer()
        quantized = solve(problem, grid)
        check(problem, quantized, grid)
        assert layer_error(problem, quantized.dequantize()) < 0.2

    def test_zeros_stay(self, solve, grid):
        problem = layer()
        mask = torch.rand(problem.weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
        problem = replace(problem, weight=problem.weight * mask, mask=mask)
        quantized = solve(problem, grid)
        check(problem, quantized, grid)
        assert not quantized.codes.float()[~mask].any()

    @pytest.mark.parametrize("tokens", [0, 1])
    def test_few_tokens(self, solve, grid, tokens):
        problem = layer(tokens=tokens)
        quantized = solve(problem, grid)
        check(problem, quantized, grid)
        assert layer_error(problem, quantized.dequantize()) < 0.35

    def test_dead_inputs_and_dead_weights(self, solve, grid):
        problem = layer(dead=range(16, 34))
        problem.weight[5] = 0
        problem.weight[:, 40:] = 0
        quantized = solve(problem, grid)
        check(problem, quantized, grid)
        assert layer_error(problem, quantized.dequantize()) < 0.2

    def test_same_bits_again_and_nothing_given_is_changed(self, solve, grid):
        problem = layer()
        weight, gram = problem.weight.clone(), problem.moments.gram.clone()
        first, second = solve(problem, grid), solve(layer(), grid)
        assert torch.equal(first.codes.float(), second.codes.float()) and torch.equal(first.scales, second.scales)
        assert torch.equal(problem.weight, weight) and torch.equal(problem.moments.gram, gram)


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_a_group_that_does_not_divide_is_refused_by_name(solve):
    with pytest.raises(CompressionError, match=r"block\.0\.proj: 48 inputs .* group_size 20"):
        solve(layer(), Grid(group_size=20))


@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - {"joint"}))
def test_weights_on_the_grid_are_left_alone(name):
    """Dense weights that the grid holds exactly; not for joint, which must prune."""
    solve = SOLVERS[name]
    codes = torch.randint(-7, 8, (24, 48), generator=torch.Generator().manual_seed(2)).float()
    codes[:, ::16] = 7
    problem = replace(layer(), weight=codes * 0.03)
    torch.testing.assert_close(solve(problem, GRIDS["int4-group"]).dequantize(), problem.weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("tokens", [0, 1, 200])
def test_factors_are_positive_and_finite(factors, tokens):
    problem = layer(tokens=tokens, dead=[3, 4])
    problem.weight[:, 9] = 0
    pair = [problem, replace(problem, weight=problem.weight[:8] * 2)]
    found = factors(pair, GRIDS["int4-group"])
    assert found.shape == (48,) and found.dtype == torch.float32
    assert torch.isfinite(found).all() and (found > 0).all()
    assert torch.equal(found, factors(pair, GRIDS["int4-group"]))
    if tokens == 0:
        assert torch.equal(found, torch.ones(48))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RtnConfig(clip="best"), "clip must be one of none, mse, moments; found 'best'"),
        (lambda: GptqConfig(damping=-1.0), "damping must be 0 or more"),
        (lambda: QuantEaseConfig(start="w"), "start must be gptq or rtn; found 'w'"),
        (lambda: QuantEaseConfig(unrounded_every=1), "no sweep would round"),
        (lambda: JointConfig(rounds=0), "rounds must be 1 or more"),
        (lambda: AwqConfig(points=0), "points must be 1 or more"),
        (lambda: SmoothQuantConfig(alpha=1.5), "alpha must be in 0 to 1"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
