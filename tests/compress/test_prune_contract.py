"""What every unstructured pruning method keeps: shape, pattern, mask, and sense where calibration saw little."""

import dataclasses
from itertools import product

import pytest
import torch

from limbeck.compress.problem import LayerProblem, Moments
from limbeck.compress.prune import alps, magnitude, sparsegpt, wanda
from limbeck.compress.prune.pattern import Pattern
from limbeck.errors import CompressionError, ConfigError

FAMILY = {
    "magnitude": (magnitude.solve, magnitude.MagnitudeConfig()),
    "wanda": (wanda.solve, wanda.WandaConfig()),
    "wanda refit": (wanda.solve, wanda.WandaConfig(refit=True)),
    "sparsegpt": (sparsegpt.solve, sparsegpt.SparseGptConfig()),
    "sparsegpt small blocks": (sparsegpt.solve, sparsegpt.SparseGptConfig(block_size=7)),
    "sparsegpt refit": (sparsegpt.solve, sparsegpt.SparseGptConfig(refit=True)),
    "alps": (alps.solve, alps.AlpsConfig()),
}
PATTERNS = ["0", "0.5", "0.37", "0.9", "2:4", "1:4", "3:8", "4:4"]
OUTPUTS, INPUTS = 20, 48

family = pytest.mark.parametrize("name", FAMILY)


def make_inputs(tokens=500, inputs=INPUTS):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator) / torch.arange(1, inputs + 1).sqrt()[:, None]
    return torch.randn(tokens, inputs, generator=generator) @ mix


def make_problem(inputs=None, mask=None):
    inputs = make_inputs() if inputs is None else inputs
    weight = torch.randn(OUTPUTS, inputs.shape[1], generator=torch.Generator().manual_seed(1))
    if mask is not None:
        weight = weight * mask
    return LayerProblem(weight, Moments.of(inputs), mask=mask)


def run(name, problem, pattern="0.5"):
    solve, config = FAMILY[name]
    return solve(problem, Pattern.parse(pattern), config)


def assert_pattern(weight, pattern, per_row=False):
    pattern = Pattern.parse(pattern)
    stays = weight != 0
    if pattern.group:
        assert (stays.view(-1, pattern.group).sum(1) == pattern.kept).all()
    elif per_row:
        assert ((~stays).sum(1) == round(pattern.sparsity * weight.shape[1])).all()
    else:
        assert int((~stays).sum()) == round(pattern.sparsity * weight.numel())


@pytest.mark.parametrize(("name", "pattern"), product(FAMILY, PATTERNS))
def test_result_has_the_shape_of_the_layer_and_exactly_the_zeros_of_the_pattern(name, pattern):
    weight = run(name, make_problem(), pattern)
    assert weight.shape == (OUTPUTS, INPUTS)
    assert weight.dtype == torch.float32
    assert weight.is_contiguous()
    assert torch.isfinite(weight).all()
    assert not (torch.signbit(weight) & (weight == 0)).any(), "negative zeros do not compress"
    assert_pattern(weight, pattern, per_row="wanda" in name)


@family
def test_nothing_to_prune_leaves_the_layer_alone(name):
    problem = make_problem()
    torch.testing.assert_close(run(name, problem, "0"), problem.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "pattern"), product(FAMILY, ["0.5", "2:4"]))
def test_zeros_of_the_mask_stay_and_count(name, pattern):
    mask = torch.rand(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(2)) > 0.2
    weight = run(name, make_problem(mask=mask), pattern)
    assert (weight[~mask] == 0).all()
    if pattern == "2:4":
        assert ((weight != 0).view(-1, 4).sum(1) == mask.view(-1, 4).sum(1).clamp(max=2)).all()
    else:
        assert_pattern(weight, pattern, per_row="wanda" in name)


@family
def test_mask_with_more_zeros_than_asked_for_prunes_no_further(name):
    mask = torch.rand(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(2)) > 0.8
    problem = make_problem(mask=mask)
    assert torch.equal(run(name, problem, "0.5") != 0, mask)


@family
def test_mask_without_any_free_weight_gives_zero(name):
    assert not run(name, make_problem(mask=torch.zeros(OUTPUTS, INPUTS, dtype=torch.bool))).any()


@family
def test_same_problem_gives_the_same_bits_and_is_not_modified(name):
    problem = make_problem()
    weight, gram = problem.weight.clone(), problem.moments.gram.clone()
    assert torch.equal(run(name, problem), run(name, make_problem()))
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.moments.gram, gram)


@pytest.mark.parametrize(("name", "pattern"), product(FAMILY, ["0.5", "2:4"]))
@pytest.mark.parametrize("inputs", [torch.zeros(0, INPUTS), torch.zeros(9, INPUTS)], ids=["no tokens", "zero inputs"])
def test_without_any_signal_the_largest_weights_stay_as_they_are(name, pattern, inputs):
    problem = make_problem(inputs)
    weight = run(name, problem, pattern)
    keep = Pattern.parse(pattern).largest(problem.weight.abs(), per_row="wanda" in name)
    if not name.startswith("sparsegpt"):  # chooses block by block
        assert torch.equal(weight != 0, keep)
    torch.testing.assert_close(weight, problem.weight * (weight != 0))


@family
def test_one_token_is_enough_to_run(name):
    weight = run(name, make_problem(make_inputs(tokens=1)))
    assert torch.isfinite(weight).all()
    assert_pattern(weight, "0.5", per_row="wanda" in name)


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "magnitude"])
def test_weights_of_inputs_that_are_always_zero_go_before_others(name):
    inputs = make_inputs()
    inputs[:, ::4] = 0
    weight = run(name, make_problem(inputs), "0.5")
    assert torch.isfinite(weight).all()
    assert (weight[:, ::4] != 0).float().mean() < 0.1


@family
def test_pattern_that_does_not_divide_the_inputs_is_refused(name):
    with pytest.raises(CompressionError, match=r"2:5.*48.*ignore"):
        run(name, make_problem(), "2:5")


@family
def test_equal_weights_break_ties_to_the_exact_number(name):
    problem = LayerProblem(torch.ones(OUTPUTS, INPUTS), Moments.of(torch.eye(INPUTS)))
    assert_pattern(run(name, problem, "0.5"), "0.5")
    assert_pattern(run(name, problem, "2:4"), "2:4")


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (alps.AlpsConfig, {"growth": 1.0}),
        (alps.AlpsConfig, {"relaxation": 2.0}),
        (alps.AlpsConfig, {"penalty": 0.0}),
        (alps.AlpsConfig, {"steps": 0}),
        (sparsegpt.SparseGptConfig, {"block_size": 0}),
        (wanda.WandaConfig, {"damping": -0.1}),
    ],
)
def test_settings_that_cannot_work_are_refused(config, values):
    with pytest.raises(ConfigError):
        config(**values)


@pytest.mark.parametrize("config", [type(config) for _, config in FAMILY.values()])
def test_settings_are_frozen(config):
    assert config.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(config))
