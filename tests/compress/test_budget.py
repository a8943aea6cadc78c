"""The search against brute force on made-up costs, and end to end on small models."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_models import made_model

from limbeck.compress import shape_cost
from limbeck.compress.blocks import Blocks
from limbeck.compress.budget import BudgetConfig, choose, give_back, search
from limbeck.compress.calibrate import Rows
from limbeck.compress.method import stored_state
from limbeck.compress.passes import Passes
from limbeck.compress.problem import Moments
from limbeck.compress.prune.osscar import OsscarConfig
from limbeck.compress.shape_cost import Shape, ShapeCost, parameters_of
from limbeck.compress.shape_loss import ShapeLoss
from limbeck.compress.walk import write_rest
from limbeck.compress.weights import ShardWriter
from limbeck.errors import CompressionError, ConfigError

SIZES = (5, 4, 3)
ROWS = Rows.of([[*range(5, 45)], [*range(90, 60, -1)]])


def smaller(shape):
    return [(*shape[:axis], shape[axis] - 1, *shape[axis + 1 :]) for axis in range(3) if shape[axis] > 1]


def larger(shape):
    return [(*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]) for axis in range(3) if shape[axis] < SIZES[axis]]


def everything():
    return itertools.product(*(range(1, size + 1) for size in SIZES))


@st.composite
def convex_losses(draw):
    """Of each axis a loss that rises faster the more is gone; 0 for the whole."""
    tables = []
    for size in SIZES:
        rises = sorted(draw(st.lists(st.floats(0.001, 1.0), min_size=size - 1, max_size=size - 1)))
        tables.append([*itertools.accumulate(rises, initial=0.0)][::-1])
    return lambda shape: sum(table[value - 1] for table, value in zip(tables, shape, strict=True))


@settings(max_examples=60)
@given(convex_losses(), st.integers(3, sum(SIZES)))
def test_with_units_of_one_size_the_search_is_optimal(loss, target):
    steps = give_back(search(SIZES, smaller, sum, loss, target), larger, sum, loss, target)
    best = min(loss(shape) for shape in everything() if sum(shape) <= target)
    assert steps[-1].cost <= target
    assert steps[-1].loss == pytest.approx(best)


@settings(max_examples=60)
@given(convex_losses(), st.tuples(*[st.integers(1, 9)] * 3), st.floats(0.0, 1.0))
def test_with_units_of_any_size_the_target_is_met_and_nothing_is_left_over(loss, units, share):
    def cost(shape):
        return sum(unit * value for unit, value in zip(units, shape, strict=True))

    target = cost((1, 1, 1)) + share * (cost(SIZES) - cost((1, 1, 1)))
    steps = give_back(search(SIZES, smaller, cost, loss, target), larger, cost, loss, target)
    last = steps[-1]
    assert last.cost == cost(last.shape) <= target and last.loss == loss(last.shape)
    assert steps[0].shape == SIZES
    assert not any(cost(shape) <= target and loss(shape) < last.loss for shape in larger(last.shape))
    # Greedy by ratio loses less than one more unit of the optimum's axis would.
    best = min(loss(shape) for shape in everything() if cost(shape) <= target)
    assert last.loss <= best + 1.0 + 1e-9


def test_a_large_unit_does_not_win_by_overshooting():
    def cost(shape):
        return 100 * shape[0] + shape[1]

    def loss(shape):
        return 10 * (5 - shape[0]) + (4 - shape[1])

    steps = search(SIZES, lambda shape: smaller(shape)[:2], cost, loss, target=503)
    assert steps[-1].shape == (5, 3, 3)


def test_what_is_out_of_reach_is_said():
    with pytest.raises(CompressionError, match="target 2 is out of reach; the least with these kinds of cuts is 3"):
        search(SIZES, smaller, sum, lambda shape: 0.0, 2)


@torch.no_grad()
def moments_of(model):
    """Moments of the inputs of o_proj and down_proj, by the names of the walk."""
    moments, handles = {}, []
    for number, layer in enumerate(model.model.layers):
        for role, linear in (("attention_out", layer.self_attn.o_proj), ("mlp_out", layer.mlp.down_proj)):

            def keep(_, arguments, name=f"layers.{number}.{role}"):
                moments[name] = Moments.of(arguments[0].flatten(0, 1))

            handles.append(linear.register_forward_pre_hook(keep))
    draw = torch.Generator().manual_seed(5)
    model(torch.randint(3, 96, (4, 64), generator=draw))
    for handle in handles:
        handle.remove()
    return moments


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("metric", ["parameters", "bytes", "milliseconds"])
def test_a_model_is_brought_within_its_target(family, metric, monkeypatch):
    # A clock that counts weights: what a busy machine takes for models of this size says nothing of their shapes.
    monkeypatch.setattr(shape_cost, "prompt_milliseconds", lambda config, *_: parameters_of(config) / 1e4)
    model = made_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost = ShapeCost(model.config, model.dtype, model.device, metric, 32, 3)
    whole = cost(Shape(48, 2, (0, 1, 2)))
    config = BudgetConfig(metric=metric, target=0.7 * whole, prompt_tokens=32, multiple_of=8, neuron_step=1 / 6)
    steps = choose(model, ROWS, moments_of(model), config, torch.float32)
    assert steps[0].shape == Shape(48, 2, (0, 1, 2)) and steps[0].loss == pytest.approx(0, abs=1e-6)
    assert steps[-1].cost <= config.target
    assert steps[-1].shape.neurons % 8 == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_milliseconds_are_those_of_the_clock(monkeypatch):
    ticks = itertools.accumulate(itertools.cycle([0.0, 0.003]))
    monkeypatch.setattr(shape_cost.time, "perf_counter", lambda: next(ticks))
    model = made_model("llama")
    cost = ShapeCost(model.config, model.dtype, model.device, "milliseconds", 32, 3)
    assert cost(Shape(48, 2, (0, 1, 2))) == pytest.approx(3.0)


@torch.no_grad()
def test_the_search_is_no_worse_than_cutting_one_kind():
    model = made_model("llama", seed=4)
    moments = moments_of(model)
    target = 0.8 * parameters_of(model.config)

    def last(*kinds):
        config = BudgetConfig(target=target, kinds=kinds, multiple_of=4, neuron_step=1 / 12)
        return choose(model, ROWS, moments, config, torch.float32)[-1]

    both = last("neurons", "kv_groups", "layers")
    for kind in ("neurons", "layers"):
        assert both.loss <= last(kind).loss * 1.05


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_loss_of_a_shape_is_that_of_the_masked_model(family):
    model = made_model(family)
    moments, want = moments_of(model), logits_of(model)
    levels = {"neurons": [16, 32, 48], "kv_groups": [1, 2]}
    with ShapeLoss(model, Passes(model, ROWS), moments, OsscarConfig(), levels) as loss:
        value = loss(Shape(32, 1, (0, 2)))
        assert loss(Shape(48, 2, (0, 1, 2))) < 1e-6 < value
        assert loss.at(Shape(32, 1, (0, 2))).mean_loss([0, 2]) == value
        for layer in model.model.layers:
            assert int(layer.mlp.down_proj.weight.any(0).sum()) == 32
            heads = layer.self_attn.o_proj.weight.unflatten(1, (2, -1))
            assert int(heads.any(2).any(0).sum()) == 1
        model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
        got = logits_of(model)
        del model.model.layers[1].forward
    teacher, student = want.log_softmax(-1), got.log_softmax(-1)
    assert value == pytest.approx(float((teacher.exp() * (teacher - student)).sum(-1).mean()), rel=1e-4)
    assert torch.equal(logits_of(model), want)


@torch.no_grad()
def test_every_expert_keeps_its_own_neurons():
    model = made_model("mixtral")
    moments = {
        f"layers.{layer}.mlp_out.{expert}": Moments.of(torch.randn(99, 48) * torch.rand(48))
        for layer in range(3)
        for expert in range(4)
    }
    levels = {"neurons": [32, 48], "kv_groups": [2]}
    with ShapeLoss(model, Passes(model, ROWS), moments, OsscarConfig(), levels) as loss:
        assert loss(Shape(32, 2, (0, 1, 2))) > 1e-6
        stays = model.model.layers[0].mlp.experts.down_proj.any(1)
        assert stays.sum(1).tolist() == [32] * 4 and not torch.equal(stays[0], stays[1])


def logits_of(model):
    """[N V] where a next token follows."""
    rows = zip(ROWS.input_ids, ROWS.valid, strict=True)
    return torch.cat([model(ids[valid][None]).logits[0, :-1] for ids, valid in rows])


def test_costs_are_those_of_real_models():
    for family in ("llama-tied", "mixtral", "gemma"):
        model = made_model(family)
        assert parameters_of(model.config) == model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "gemma"])
def test_bytes_are_those_of_the_files_that_are_written(family, dtype, tmp_path):
    made_model(family).to(dtype).save_pretrained(tmp_path / "model")
    blocks = Blocks(str(tmp_path / "model"))
    writer = ShardWriter(tmp_path, len(blocks) + 1)
    for number in range(len(blocks)):
        with blocks.block(number, torch.device("cpu")) as block:
            writer.write(number, blocks.stored(number, stored_state(block, blocks.dtypes)))
    cost = ShapeCost(blocks.config, dtype, torch.device("cpu"), "bytes")
    assert cost(Shape(48, 2, (0, 1, 2))) == write_rest(blocks, writer)


def test_missing_moments_and_wrong_settings_are_refused():
    model = made_model("llama")
    with pytest.raises(CompressionError, match=r"no moments of layers\.0\.mlp_out"):
        choose(model, ROWS, {}, BudgetConfig(target=1000.0), torch.float32)
    with pytest.raises(ConfigError, match=r"kinds.*heads"):
        BudgetConfig(target=1.0, kinds=("heads",))
    with pytest.raises(ConfigError, match="neuron_step must lie between 0 and 1"):
        BudgetConfig(target=1.0, neuron_step=1.0)
