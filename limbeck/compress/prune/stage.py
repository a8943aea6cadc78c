"""The stage `prune`: a model in, a sparser or a smaller model out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from limbeck.checkpoint import Checkpoint
from limbeck.compress.blocks import Blocks
from limbeck.compress.budget import BudgetConfig, choose
from limbeck.compress.calibrate import Rows, split_rows
from limbeck.compress.masks import write_masks
from limbeck.compress.method import Method, Record
from limbeck.compress.moments import stored_or_collected
from limbeck.compress.passes import Passes
from limbeck.compress.prune import alps, magnitude, sparsegpt, wanda
from limbeck.compress.prune.alps import AlpsConfig
from limbeck.compress.prune.depth import remove_layers
from limbeck.compress.prune.magnitude import MagnitudeConfig
from limbeck.compress.prune.methods import Sparsify, Structured
from limbeck.compress.prune.osscar import OsscarConfig
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.prune.sparsegpt import SparseGptConfig
from limbeck.compress.prune.wanda import WandaConfig
from limbeck.compress.shape_cost import Shape, whole_shape
from limbeck.compress.shrink import kv_group_choices, round_size, shrunk_config
from limbeck.compress.stage import CompressConfig, Finish, Job, compress
from limbeck.compress.weights import SafetensorSource, dtype_of, stored_size
from limbeck.config import checked, only
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
class PruneConfig(CompressConfig):
    """Prune a model: whole layers, neurons and KV groups (osscar, depth), or single weights (the other methods)."""

    method: str = "osscar"
    """osscar | depth | alps | sparsegpt | wanda | magnitude."""
    drop_layers: int = only("method", "osscar", "depth", default=0)
    """Whole layers to remove first, those whose absence costs least on held-out text."""
    neuron_sparsity: float = only("method", "osscar", default=0.25)
    """Share of the MLP neurons to remove."""
    kv_group_sparsity: float = only("method", "osscar", default=0.0)
    """Share of the KV groups to remove, each with its query heads."""
    budget: BudgetConfig | None = only("method", "osscar", default=None)
    """A target in parameters, bytes or milliseconds instead: neurons, KV groups and layers are chosen for it by the
    loss of every unit saved."""
    multiple_of: int = only("method", "osscar", default=32)
    """The neurons that stay are a multiple of this, for the kernels of engines."""
    pattern: str = only("method", *SOLVERS, default="0.5")
    """Share of zeros, or N:M, N of every M inputs stay."""
    alps: AlpsConfig = only("method", "alps", default_factory=AlpsConfig)
    """Settings of alps."""
    sparsegpt: SparseGptConfig = only("method", "sparsegpt", default_factory=SparseGptConfig)
    """Settings of sparsegpt."""
    wanda: WandaConfig = only("method", "wanda", default_factory=WandaConfig)
    """Settings of wanda."""
    magnitude: MagnitudeConfig = only("method", "magnitude", default_factory=MagnitudeConfig)
    """Settings of magnitude."""
    osscar: OsscarConfig = only("method", "osscar", default_factory=OsscarConfig)
    """Settings of osscar."""

    def __post_init__(self) -> None:
        CompressConfig.__post_init__(self)
        if self.method not in METHODS:
            raise ConfigError(f"method: unknown {self.method!r}; {nearest(self.method, METHODS)}")
        Pattern.parse(self.pattern)
        for name in ("neuron_sparsity", "kv_group_sparsity"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1); found {getattr(self, name)}")
        if self.drop_layers < (1 if self.method == "depth" else 0):
            raise ConfigError(f"drop_layers: {self.drop_layers}; method depth removes 1 or more, osscar 0 or more")
        if self.multiple_of < 1:
            raise ConfigError(f"multiple_of must be 1 or more; found {self.multiple_of}")


def run(config: PruneConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Prune a model and write the checkpoint.

    Raises: ConfigError, ModelError or CompressionError when the model cannot be pruned as asked.
    """
    needs_data = config.method != "magnitude"
    method: Method
    finish: Finish
    if config.method in SOLVERS:
        solve, settings = SOLVERS[config.method], getattr(config, config.method)
        blocks, method = Blocks(config.model), Sparsify(solve, Pattern.parse(config.pattern), settings)
        finish = partial(_write_mask, blocks)
    else:
        shape, metrics = _shape(config)
        blocks = Blocks(config.model, shape.layers)
        method = Structured(blocks.config, shape.neurons, shape.kv_groups, config.osscar)
        finish = partial(_write_config, smaller_config(blocks.config, shape), blocks.config, shape, metrics)
    job = Job("prune", config, blocks, method, needs_data, finish)
    return compress(job, out, how)


def _shape(config: PruneConfig) -> tuple[Shape, dict[str, Any]]:
    """The sizes asked for, or those that the search finds, with what is to be said about the choice."""
    model_config = Blocks(config.model).config
    shape = whole_shape(model_config)
    if config.budget is not None:
        with stored_or_collected(config.moments, config.model, config.calibration) as stored:
            moments = stored.named(("attention_out", "mlp_out"))
        steps = choose(
            load_model(config.model, torch.float32, whole=True),
            _apart(config),
            moments,
            config.budget,
            dtype_of(config.model),
        )
        return steps[-1].shape, {"search": [[*step.shape, step.cost, step.loss] for step in steps]}
    metrics: dict[str, Any] = {}
    if config.drop_layers:
        depth = remove_layers(Passes(load_model(config.model, torch.float32), _apart(config)), config.drop_layers)
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


def _write_mask(blocks: Blocks, directory: Path, records: list[Record]) -> dict[str, Any]:
    """The mask beside the weights, which stay dense: no engine reads sparse files any more."""
    source = SafetensorSource(directory)
    masks = {name: source.tensor(name) != 0 for name in blocks.stored_names([record.name for record in records])}
    write_masks(directory, masks)
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    return {
        "parameters": stored_size(directory).parameters,
        "sparsity": zeros / max(sum(mask.numel() for mask in masks.values()), 1),
    }


def smaller_config(whole: Any, shape: Shape) -> Any:
    """The config of a model in a shape; a size that stays is not asked for, since some models have no one number."""
    before = whole_shape(whole)
    return shrunk_config(
        whole,
        neurons=None if shape.neurons == before.neurons else shape.neurons,
        kv_groups=None if shape.kv_groups == before.kv_groups else shape.kv_groups,
        layers=shape.layers,
    )


def _write_config(
    smaller: Any, whole: Any, shape: Shape, metrics: dict[str, Any], directory: Path, records: list[Record]
) -> dict[str, Any]:
    smaller.save_pretrained(directory)
    before = whole_shape(whole)
    return {
        "parameters": stored_size(directory).parameters,
        "neurons": [before.neurons, shape.neurons],
        "kv_groups": [before.kv_groups, shape.kv_groups],
        "removed_layers": sorted(set(before.layers) - set(shape.layers)),
        **metrics,
    }
