"""The stage `prune`: a model in, a sparser or a smaller model out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

import torch

from limbeck.checkpoint import Checkpoint
from limbeck.compress.blocks import Blocks
from limbeck.compress.budget import BudgetConfig, choose
from limbeck.compress.calibrate import CalibrationConfig, Rows, split_rows
from limbeck.compress.fidelity import GateConfig
from limbeck.compress.masks import write_masks
from limbeck.compress.moments import stored_or_collected
from limbeck.compress.passes import Passes
from limbeck.compress.prune import alps, magnitude, sparsegpt, wanda
from limbeck.compress.prune.alps import AlpsConfig
from limbeck.compress.prune.depth import remove_layers
from limbeck.compress.prune.magnitude import MagnitudeConfig
from limbeck.compress.prune.methods import Solve, Sparsify, Structured
from limbeck.compress.prune.osscar import OsscarConfig
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.prune.sparsegpt import SparseGptConfig
from limbeck.compress.prune.wanda import WandaConfig
from limbeck.compress.shape_cost import Shape, whole_shape
from limbeck.compress.shrink import kv_group_choices, round_size, shrunk_config
from limbeck.compress.stage import Finish, Job, compress, parameters_of
from limbeck.compress.walk import Method, Record, WalkOptions
from limbeck.compress.weights import SafetensorSource
from limbeck.config import checked
from limbeck.errors import ConfigError, nearest
from limbeck.models.load import load_model, load_tokenizer
from limbeck.stage import How

SOLVERS: dict[str, Callable[..., torch.Tensor]] = {
    "magnitude": magnitude.solve,
    "wanda": wanda.solve,
    "sparsegpt": sparsegpt.solve,
    "alps": alps.solve,
}
METHODS = (*SOLVERS, "osscar", "depth")


@checked
class PruneConfig:
    """Prune a model: whole layers, neurons and KV groups (osscar, depth), or single weights (the other methods)."""

    model: str
    """Directory, alias (tiny-teacher, tiny-student, smollm2-135m) or hub id."""
    method: str = "osscar"
    """osscar | depth | alps | sparsegpt | wanda | magnitude."""
    drop_layers: int = 0
    """Whole layers to remove first, those whose absence costs least on held-out text (osscar, depth)."""
    neuron_sparsity: float = 0.25
    """Share of the MLP neurons to remove (osscar)."""
    kv_group_sparsity: float = 0.0
    """Share of the KV groups to remove, each with its query heads (osscar)."""
    budget: BudgetConfig | None = None
    """A target in parameters, bytes or milliseconds instead: neurons, KV groups and layers are chosen for it by the
    loss of every unit saved (osscar)."""
    multiple_of: int = 32
    """The neurons that stay are a multiple of this, for the kernels of engines (osscar)."""
    pattern: str = "0.5"
    """Share of zeros, or N:M, N of every M inputs stay (single weights)."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Tokens that the layers are shown."""
    moments: Path | None = None
    """Moments collected by `limbeck moments`: solve from them, without passing through the model again."""
    dense_targets: bool = False
    """Let every layer aim at the dense model's output, so that later layers repair earlier damage."""
    gate: GateConfig = field(default_factory=GateConfig)
    """What the compressed model may lose on held-out text."""
    ignore: tuple[str, ...] = ()
    """Layers whose name contains one of these are left as they are."""
    alps: AlpsConfig = field(default_factory=AlpsConfig)
    """Settings of alps."""
    sparsegpt: SparseGptConfig = field(default_factory=SparseGptConfig)
    """Settings of sparsegpt."""
    wanda: WandaConfig = field(default_factory=WandaConfig)
    """Settings of wanda."""
    magnitude: MagnitudeConfig = field(default_factory=MagnitudeConfig)
    """Settings of magnitude."""
    osscar: OsscarConfig = field(default_factory=OsscarConfig)
    """Settings of osscar."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method: unknown {self.method!r}; {nearest(self.method, METHODS)}")
        Pattern.parse(self.pattern)
        for name in ("neuron_sparsity", "kv_group_sparsity"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1); found {getattr(self, name)}")
        if self.drop_layers < (1 if self.method == "depth" else 0):
            raise ConfigError(f"drop_layers: {self.drop_layers}; method depth removes 1 or more, others 0 or more")
        if self.drop_layers and self.method not in ("osscar", "depth"):
            raise ConfigError(f"drop_layers: method {self.method} removes single weights only")
        if self.budget is not None and self.method != "osscar":
            raise ConfigError(f"budget: method {self.method} does not change shapes; set method to osscar")
        if self.multiple_of < 1:
            raise ConfigError(f"multiple_of must be 1 or more; found {self.multiple_of}")
        if self.moments is not None and self.dense_targets:
            raise ConfigError("dense_targets needs the walk; stored moments are those of the dense model already.")


def run(config: PruneConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Prune a model and write the checkpoint.

    Raises: ConfigError, ModelError or CompressionError when the model cannot be pruned as asked.
    """
    options = WalkOptions("prune", config.dense_targets, config.ignore)
    needs_data = config.method != "magnitude"
    job = Job(
        "prune",
        config.model,
        config,
        config.calibration,
        config.moments,
        options,
        config.gate,
        config.method,
        needs_data,
    )
    method: Method
    finish: Finish
    if config.method in SOLVERS:
        blocks, method, finish = Blocks(config.model), Sparsify(_solver(config)), _write_mask
    else:
        shape, metrics = _shape(config)
        blocks = Blocks(config.model, shape.layers)
        method = Structured(blocks.config, shape.neurons, shape.kv_groups, config.osscar)
        finish = _smaller_config(blocks.config, shape, metrics)
    return compress(job, blocks, method, out, how=how, finish=finish)


def _shape(config: PruneConfig) -> tuple[Shape, dict[str, Any]]:
    """The sizes asked for, or those that the search finds, with what is to be said about the choice."""
    model_config = Blocks(config.model).config
    shape = whole_shape(model_config)
    if config.budget is not None:
        with stored_or_collected(config.moments, config.model, config.calibration) as stored:
            moments = stored.named(("attention_out", "mlp_out"))
        steps = choose(load_model(config.model), _apart(config), moments, config.budget)
        return steps[-1].shape, {"search": [[*step.shape, step.cost, step.loss] for step in steps]}
    metrics: dict[str, Any] = {}
    if config.drop_layers:
        depth = remove_layers(Passes(load_model(config.model), _apart(config)), config.drop_layers)
        shape, metrics = shape._replace(layers=depth.kept), {"loss_without_layers": list(depth.losses)}
    if config.method == "depth":
        return shape, metrics
    neurons, kv_groups = sizes_after(config, model_config)
    return shape._replace(neurons=neurons, kv_groups=kv_groups), metrics


def sizes_after(config: PruneConfig, model_config: Any) -> tuple[int, int]:
    """Neurons and KV groups of a layer that the shares of the config leave of a model."""
    whole = whole_shape(model_config)
    neurons = round_size((1 - config.neuron_sparsity) * whole.neurons, config.multiple_of, whole.neurons)
    groups = (1 - config.kv_group_sparsity) * whole.kv_groups
    # transformers does not load every number of heads, so the nearest one that it loads is taken.
    return neurons, min(kv_group_choices(model_config), key=lambda count: (abs(count - groups), count))


def _apart(config: PruneConfig) -> Rows:
    """Tokens beside those of calibration, for the loss that whole layers and sizes are chosen by."""
    held_out = max(config.gate.sequences, 1)
    rows, apart = split_rows(config.calibration, load_tokenizer(config.model), config.model, held_out)
    return apart or rows


def _solver(config: PruneConfig) -> Solve:
    solve, settings, pattern = SOLVERS[config.method], getattr(config, config.method), Pattern.parse(config.pattern)

    return lambda problem: solve(problem, pattern, settings)


def _write_mask(directory: Path, records: list[Record]) -> dict[str, Any]:
    """The mask beside the weights, which stay dense: no engine reads sparse files any more."""
    source = SafetensorSource(directory)
    masks = {f"model.{record.name}.weight": source.tensor(f"model.{record.name}.weight") != 0 for record in records}
    write_masks(directory, masks)
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    return {
        "parameters": parameters_of(directory),
        "sparsity": zeros / max(sum(mask.numel() for mask in masks.values()), 1),
    }


def _smaller_config(whole: Any, shape: Shape, metrics: dict[str, Any]) -> Finish:
    def finish(directory: Path, records: list[Record]) -> dict[str, Any]:
        smaller = shrunk_config(whole, neurons=shape.neurons, kv_groups=shape.kv_groups, layers=shape.layers)
        smaller.save_pretrained(directory)
        before = whole_shape(whole)
        return {
            "parameters": parameters_of(directory),
            "neurons": [before.neurons, shape.neurons],
            "kv_groups": [before.kv_groups, shape.kv_groups],
            "removed_layers": sorted(set(before.layers) - set(shape.layers)),
            **metrics,
        }

    return finish
