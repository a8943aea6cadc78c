"""Laws of the rounding solvers, on correlated inputs with outlier channels: with H = I all of them only round."""

import itertools
from dataclasses import replace

import pytest
import torch

from limbeck.compress.problem import LayerProblem, Moments, layer_error
from limbeck.compress.prune import alps
from limbeck.compress.prune.alps import AlpsConfig
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.quantize import awq, gptq, joint, quantease, rtn
from limbeck.compress.quantize.awq import AwqConfig
from limbeck.compress.quantize.descent import Descent
from limbeck.compress.quantize.gptq import GptqConfig
from limbeck.compress.quantize.grid import FP8_LARGEST, Grid, encode
from limbeck.compress.quantize.joint import JointConfig
from limbeck.compress.quantize.quantease import QuantEaseConfig
from limbeck.compress.quantize.rtn import RtnConfig
from limbeck.compress.quantize.scales import fit_scales
from limbeck.compress.quantize.smoothquant import SmoothQuantConfig
from limbeck.compress.quantize.smoothquant import factors as smooth

GRIDS = [Grid(bits=4, group_size=16), Grid(bits=3, group_size=None), Grid(bits=4, group_size=32, largest_code=5)]
FP8 = Grid(bits=8, kind="float", group_size=None)


def layer(outputs=48, inputs=96, seed=0, tokens=400, zeros=0.0):
    """A layer whose inputs share a few causes, four channels being 15 times the others."""
    draw = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, inputs // 4, generator=draw) @ torch.randn(inputs // 4, inputs, generator=draw)
    x = causes / (inputs // 4) ** 0.5 + 0.3 * torch.randn(tokens, inputs, generator=draw)
    x[:, torch.randperm(inputs, generator=draw)[: max(inputs // 24, 1)]] *= 15
    weight = torch.randn(outputs, inputs, generator=draw) * torch.rand(outputs, 1, generator=draw).add(0.5)
    mask = torch.rand(outputs, inputs, generator=draw) >= zeros
    return LayerProblem(weight * mask, Moments.of(x), "made", mask if zeros else None)


def error(problem, quantized):
    return layer_error(problem, quantized.dequantize())


def damped_error(descent):
    return float(((descent.hessian @ descent.off) * descent.off).sum(dtype=torch.float64))


@pytest.mark.parametrize("grid", [*GRIDS, FP8], ids=str)
@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_no_rounded_sweep_and_no_refit_raises_any_output_s_error(grid, zeros):
    problem = layer(zeros=zeros)
    begin = rtn.solve(problem, grid, RtnConfig())
    descent = Descent(problem, begin.dequantize(), begin.scales, 0.01, block=40)
    for sweep in range(8):
        before = descent.error.clone()
        descent.sweep(grid, refit=sweep % 2 == 1)
        assert (descent.error <= before * (1 + 1e-5)).all()
        assert float(descent.error.sum()) == pytest.approx(damped_error(descent), rel=1e-4)
    assert float(descent.error.sum()) < 0.7 * float(descent.least.sum())


def test_an_unrounded_sweep_leaves_the_grid_but_loses_nothing():
    problem, grid = layer(), GRIDS[0]
    begin = gptq.solve(problem, grid, GptqConfig())
    descent = Descent(problem, begin.dequantize(), begin.scales, 0.01, block=32)
    descent.sweep(None)
    assert float(descent.error.sum()) < float(descent.least.sum())
    torch.testing.assert_close(descent.result(grid).dequantize(), begin.dequantize())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_ends_where_no_single_code_is_better(grid):
    problem = layer(outputs=16, inputs=96)
    config = QuantEaseConfig(sweeps=200, unrounded_every=0, refit_scales=False, tolerance=0.0)
    quantized = quantease.solve(problem, grid, config)
    values, hessian = quantized.dequantize(), problem.moments.damped()
    steps = quantized.scales.repeat_interleave(96 // quantized.scales.shape[1], dim=1)
    slope = (values - problem.weight) @ hessian
    for change in (-1.0, 1.0):
        allowed = (quantized.codes + change >= grid.range[0]) & (quantized.codes + change <= grid.range[1])
        rise = 2 * change * steps * slope + steps.square() * hessian.diagonal()
        assert (rise[allowed] >= -1e-4 * rise.abs().mean()).all()
    again = quantease.descend(problem, quantized, config)
    assert torch.equal(again.codes, quantized.codes)


@pytest.mark.parametrize("zeros", [0.0, 0.4])
def test_blocks_change_nothing_but_the_speed(zeros):
    """Against coordinate descent written out, one input after the other with the whole gradient."""
    problem, grid = layer(outputs=12, inputs=48, zeros=zeros), Grid(bits=4, group_size=16)
    begin = rtn.solve(problem, grid, RtnConfig())
    descent = Descent(problem, begin.dequantize(), begin.scales, 0.01, block=16)
    hessian, weight = problem.moments.damped().double(), problem.weight.double()
    plain, steps = begin.dequantize().double(), begin.scales.double().repeat_interleave(16, dim=1)
    mask = torch.ones_like(plain) if problem.mask is None else problem.mask.double()
    for rounded in (True, True, False, True):
        descent.sweep(grid if rounded else None)
        for j in range(48):
            wanted = plain[:, j] - (plain - weight) @ hessian[:, j] / hessian[j, j]
            if rounded:
                wanted = (wanted / steps[:, j]).round().clamp(*grid.range) * steps[:, j]
            plain[:, j] = wanted * mask[:, j]
        torch.testing.assert_close(descent.values.T, plain.float(), rtol=1e-3, atol=1e-3)


def plain_gptq(weight, moments, scales, grid, order):
    """GPTQ as its paper writes it: every remaining column is brought up to date after every column, in float64."""
    hessian = moments.damped().double()[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, done = weight.double()[:, order].clone(), torch.zeros_like(weight, dtype=torch.float64)
    steps = scales.double().repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)[:, order]
    for j in range(len(order)):
        done[:, j] = (left[:, j] / steps[:, j]).round().clamp(*grid.range) * steps[:, j]
        left[:, j:] -= torch.outer((left[:, j] - done[:, j]) / upper[j, j], upper[j, j:])
    return done[:, order.argsort()].float()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_gptq_equals_a_plain_twin(ordered, block):
    problem, grid = layer(), Grid(bits=4, group_size=32)
    quantized = gptq.solve(problem, grid, GptqConfig(ordered=ordered, block=block))
    order, _ = problem.moments.ordered_factor(ordered=ordered)
    twin = plain_gptq(problem.weight, problem.moments, quantized.scales, grid, order)
    same = torch.isclose(quantized.dequantize(), twin, atol=1e-4).float().mean()
    assert same > 0.995  # float32 decides a few ties otherwise
    assert error(problem, quantized) == pytest.approx(layer_error(problem, twin), rel=0.02)


def test_the_order_of_inputs_takes_the_smallest_pivots_last():
    moments = layer(inputs=150).moments
    order, factor = moments.ordered_factor()
    assert sorted(order.tolist()) == list(range(150))
    hessian, pivots = moments.damped().double(), []
    rest, left = hessian.clone(), list(range(150))
    for _ in range(150):
        index = min(left, key=lambda j: rest[j, j])
        pivots.append(float(rest[index, index]))
        left.remove(index)
        rest = rest - torch.outer(rest[index], rest[index]) / rest[index, index]
    # Places are settled 32 at a time, each by the inputs before it, which costs next to nothing of what they are for.
    assert float(factor.diagonal().pow(-2).sum()) < 1.01 * sum(pivots)
    assert factor.diagonal().pow(-2).sum() < moments.inverse_factor().diagonal().pow(-2).sum()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_errors_come_in_the_known_order(grid, seed):
    problem = layer(seed=seed)
    nearest = error(problem, rtn.solve(problem, grid, RtnConfig(clip="none")))
    in_turn = error(problem, gptq.solve(problem, grid, GptqConfig(clip="none", ordered=False)))
    better = error(problem, gptq.solve(problem, grid, GptqConfig()))
    three = error(problem, quantease.solve(problem, grid, QuantEaseConfig(sweeps=3, unrounded_every=0)))
    full = error(problem, quantease.solve(problem, grid, QuantEaseConfig()))
    assert nearest > 1.5 * in_turn > 1.5 * better > 1.5 * full
    assert better > three >= full * 0.999


def test_scales_in_the_loop_are_never_worse_than_those_of_the_start():
    for grid, clip in itertools.product(GRIDS, ("none", "mse", "moments")):
        config = QuantEaseConfig(clip=clip, sweeps=4, unrounded_every=0)
        problem = layer(seed=5)
        begin = gptq.solve(problem, grid, GptqConfig(clip=clip))
        for sweeps in (1, 4):
            fitted = error(problem, quantease.descend(problem, begin, replace(config, sweeps=sweeps)))
            assert fitted < error(problem, begin)
    without = error(problem, quantease.descend(problem, begin, replace(config, refit_scales=False)))
    assert fitted < without


@pytest.mark.parametrize("clip", ["mse", "moments"])
def test_clipping_is_never_worse_by_its_own_measure(clip):
    problem = layer()
    cost = torch.ones(96) if clip == "mse" else problem.moments.damped().diagonal()
    for grid in GRIDS:
        losses = []
        for name in ("none", clip):
            rounded = encode(problem.weight, fit_scales(problem, grid, name, cost), grid)
            losses.append((rounded.dequantize() - problem.weight).square() @ cost)
        assert (losses[1] <= losses[0] * (1 + 1e-6)).all()
        assert losses[1].sum() < 0.95 * losses[0].sum()


@pytest.mark.parametrize("sign", [1, -1])
def test_every_e4m3_code_stays_what_it_is(sign):
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[torch.isfinite(values)].abs().unique() * sign
    assert len(values) == 127 and values.abs().max() == FP8_LARGEST
    assert torch.equal(FP8.round(values), values)
    problem = replace(layer(outputs=3, inputs=127), weight=values.repeat(3, 1) * torch.tensor([[1.0], [0.25], [8.0]]))
    for quantized in (
        rtn.solve(problem, FP8, RtnConfig()),
        gptq.solve(problem, FP8, GptqConfig(clip="none")),
        quantease.solve(problem, FP8, QuantEaseConfig(clip="none")),
    ):
        assert torch.equal(quantized.codes.float(), values.repeat(3, 1))


def test_a_tiny_case_comes_near_the_best_of_all_codes():
    """Two bits, five inputs: all 1,024 rows of codes tried for the scales that the solver starts with."""
    grid, reached = Grid(bits=2, group_size=None), []
    for seed in range(12):
        problem = layer(outputs=1, inputs=5, seed=seed, tokens=50)
        config = QuantEaseConfig(refit_scales=False)
        quantized = quantease.solve(problem, grid, config)
        every = torch.tensor(list(itertools.product(range(-2, 2), repeat=5))) * quantized.scales
        off = every - problem.weight
        losses = ((off @ problem.moments.damped()) * off).sum(1)
        off = quantized.dequantize() - problem.weight
        mine = float(((off @ problem.moments.damped()) * off).sum())
        assert mine >= float(losses.min()) * (1 - 1e-5)
        reached.append(mine <= float(losses.min()) * (1 + 1e-5))
    assert sum(reached) >= 9


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_joint_is_no_worse_than_one_after_the_other(pattern):
    problem, grid, pattern = layer(), Grid(bits=4, group_size=32), Pattern.parse(pattern)
    together = joint.solve(problem, grid, JointConfig(), pattern=pattern)
    pruned = alps.solve(problem, pattern, AlpsConfig())
    after = quantease.solve(replace(problem, weight=pruned, mask=pruned != 0), grid, QuantEaseConfig())
    assert error(problem, together) < 1.01 * error(problem, after)
    zeros = together.codes == 0
    assert float(zeros.float().mean()) >= 0.5
    if pattern.group:
        assert int((~zeros).view(-1, 4).sum(1).max()) <= 2


def test_awq_is_never_worse_than_no_factors_and_helps_against_outliers():
    problems, grid = [layer(seed=1)], Grid(bits=3, group_size=32)
    problems.append(replace(problems[0], weight=layer(seed=2).weight))
    s = awq.factors(problems, grid, AwqConfig())

    def total(factor):
        scaled = [replace(p, weight=p.weight * factor) for p in problems]
        return sum(
            layer_error(p, rtn.solve(q, grid, RtnConfig(clip="none")).dequantize() / factor)
            for p, q in zip(problems, scaled, strict=True)
        )

    assert total(s) < 0.8 * total(torch.ones_like(s))
    loud = problems[0].moments.absolute_mean.topk(4).indices
    assert s[loud].min() > s.median()


def test_smoothquant_evens_out_inputs_and_weights_alike():
    problem = layer()
    s = smooth([problem], GRIDS[0], SmoothQuantConfig(alpha=0.5))
    inputs, weights = problem.moments.absolute_max / s, problem.weight.abs().amax(0) * s
    torch.testing.assert_close(inputs, weights)
    assert torch.allclose(
        problem.moments.absolute_max / smooth([problem], GRIDS[0], SmoothQuantConfig(alpha=1.0)), s / s
    )
    assert inputs.max() / inputs.median() < problem.moments.absolute_max.max() / problem.moments.absolute_max.median()
