"""`limbeck prune`, `quantize` and `recover` before they run.

Each takes, where its model does not exist yet, the transformers config that the model will have; `pruned_shape` gives
that of a pruned one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from limbeck.compress.blocks import Group, groups_of
from limbeck.compress.calibrate import CalibrationConfig, split_rows
from limbeck.compress.plan import count_work
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.prune.stage import SOLVERS, PruneConfig, sizes_after
from limbeck.compress.quantize.methods import grid_of
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.compress.recover import RecoverConfig
from limbeck.compress.rounds import plan_rounds
from limbeck.compress.shape_cost import whole_shape
from limbeck.compress.shrink import shrunk_config
from limbeck.cost.hardware import Hardware, measure
from limbeck.cost.memory import with_program, without_program
from limbeck.cost.prediction import Prediction, total
from limbeck.cost.shapes import Dims, config_of, frozen_sizes, on_meta
from limbeck.distill.data import Data, prepare
from limbeck.distill.predict import data_of, predict_run, set_up
from limbeck.models.anatomy import backbone_of
from limbeck.models.load import load_tokenizer, vocabulary_size
from limbeck.models.schemes import scheme_of
from limbeck.traces.sample import Sample


def pruned_shape(shape: Any, config: PruneConfig) -> Any:
    """The transformers config of a model after `limbeck prune`; which layers go does not change it.

    A budget's shape is found by search: here the neurons alone are cut, to the same number of parameters.
    """
    whole = whole_shape(shape)
    if config.budget is not None:
        return _within(shape, config)
    layers = range(len(whole.layers) - config.drop_layers)
    if config.method == "osscar":
        neurons, kv_groups = sizes_after(config, shape)
        return shrunk_config(shape, neurons=neurons, kv_groups=kv_groups, layers=layers)
    return shrunk_config(shape, layers=layers) if config.method == "depth" else shape


def predict_prune(
    config: PruneConfig, *, model: Any = None, tokenizer: Any = None, hardware: Hardware | None = None
) -> Prediction:
    """Cost of `limbeck prune`; arguments as for the other stages."""
    shape = model if model is not None else config_of(config.model)
    after = whole_shape(pruned_shape(shape, config))
    before = whole_shape(shape)
    changed = {
        role
        for role, is_cut in (
            ("mlp_out", after.neurons < before.neurons),
            ("attention_out", after.kv_groups < before.kv_groups),
        )
        if is_cut or config.method in SOLVERS
    }
    wants: Callable[[Group], bool] = (
        (lambda group: True) if config.method in SOLVERS else (lambda group: group.role in changed)
    )
    walks = config.moments is None and config.method != "magnitude"
    return _compression("prune", shape, config, wants, config.method, walks, tokenizer, hardware)


def predict_quantize(
    config: QuantizeConfig, *, model: Any = None, tokenizer: Any = None, hardware: Hardware | None = None
) -> Prediction:
    """Cost of `limbeck quantize`; arguments as for the other stages."""
    shape = model if model is not None else config_of(config.model)
    walks = config.moments is None and config.needs_data
    return _compression("quantize", shape, config, lambda group: True, config.method, walks, tokenizer, hardware)


def predict_recover(
    config: RecoverConfig,
    *,
    model: Any = None,
    teacher: Any = None,
    tokenizer: Any = None,
    samples: Sequence[Sample] | None = None,
    hardware: Hardware | None = None,
) -> Prediction:
    """Cost of `limbeck recover`: every round's pruning and its training, on the shape that the round has.

    Args:
      config: the stage.
      model: transformers config of the unpruned model, where it does not exist yet; `teacher`: the same of a teacher.
      tokenizer, samples, hardware: as for `predict_distill`.
    """
    hardware = hardware or measure()
    shape = model if model is not None else config_of(config.prune.model)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config.prune.model)
    data: Data = prepare(config.distill, tokenizer) if samples is None else data_of(config.distill, samples)
    if teacher is None and config.distill.teacher.model == config.prune.model:
        teacher = shape
    parts = []
    student = shape
    for planned in plan_rounds(config.prune, config.distill, config.rounds, config=shape, data=data):
        parts.append(predict_prune(planned.prune, model=student, tokenizer=tokenizer, hardware=hardware))
        student = pruned_shape(student, planned.prune)
        vocab = vocabulary_size(tokenizer)
        setup = set_up(planned.training, data, vocab, student, teacher, hardware.is_accelerator)
        parts.append(predict_run(setup, hardware))
    # All rounds share a process, and a comparison of the unpruned model comes before the first.
    return total("recover", [replace(part, memory=without_program(part.memory)) for part in parts])


def _compression(
    stage: str,
    shape: Any,
    config: PruneConfig | QuantizeConfig,
    wants: Callable[[Group], bool],
    solver: str,
    walks: bool,
    tokenizer: Any,
    hardware: Hardware | None,
) -> Prediction:
    hardware = hardware or measure()
    held_out = config.gate.sequences
    padded, tokens, apart = _calibration(config.calibration, config.model, tokenizer, held_out) if walks else (0, 0, 0)
    dense = config.dense_targets
    model = on_meta(shape)
    layers = backbone_of(model).layers
    _check_sizes(layers, config)
    work = count_work(layers, shape, padded, tokens, wants, solver, dense_targets=dense, walks=walks)  # type: ignore[arg-type]
    compared = 2 * 2.0 * apart * sum(parameter.numel() for parameter in model.parameters())
    notes = [f"products of {tokens:,} calibration tokens and of the solver, which the ledger does not count"]
    if solver in SOLVERS or stage == "quantize":
        notes.append("solvers by their factors in compress/plan.py")
    return Prediction(
        stage,
        solver_flops=int(work.flops + compared),
        memory=with_program({"workspace": work.peak_bytes}),
        seconds=(work.flops + compared) / hardware.rate("float32"),
        notes=tuple(notes),
    )


def _check_sizes(layers: Any, config: PruneConfig | QuantizeConfig) -> None:
    """Raises: CompressionError for groups or patterns that do not divide the inputs of a layer."""
    for number, layer in enumerate(layers):
        for group in filter(None, (group.without(config.ignore) for group in groups_of(layer, number))):
            for name, linear in group.linears.items():
                where = f"layers.{number}.{name}"
                if isinstance(config, QuantizeConfig):
                    grid_of(scheme_of(config.scheme, config.group_size)).groups(linear.in_features, where)
                elif config.method in SOLVERS:
                    Pattern.parse(config.pattern).check(linear.in_features, where)


def _calibration(config: CalibrationConfig, model: str, tokenizer: Any, held_out: int) -> tuple[int, int, int]:
    """Calibration tokens with and without padding, and tokens of the comparison."""
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
    rows, apart = split_rows(config, tokenizer, model, held_out)
    return rows.input_ids.numel(), rows.tokens, 0 if apart is None else apart.input_ids.numel()


def _within(shape: Any, config: PruneConfig) -> Any:
    """The config with fewer neurons that meets a budget of parameters or bytes; unchanged for one of milliseconds."""
    budget = config.budget
    assert budget is not None
    if budget.metric == "milliseconds":
        return shape
    dtype = shape.dtype if isinstance(shape.dtype, torch.dtype) else torch.float32
    target = budget.target / (dtype.itemsize if budget.metric == "bytes" else 1)
    dims, parameters = Dims.of(shape), frozen_sizes(shape).num_parameters
    surplus = max(0.0, parameters - target) / (3 * dims.width * dims.layers)
    neurons = max(budget.multiple_of, int((dims.neurons - surplus) // budget.multiple_of * budget.multiple_of))
    return shrunk_config(shape, neurons=min(neurons, dims.neurons))
