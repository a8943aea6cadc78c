"""The stage `prune`: a model in, a sparser or a smaller model out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from limbeck.compress.blocks import Blocks
from limbeck.compress.calibrate import CalibrationConfig
from limbeck.compress.masks import write_masks
from limbeck.compress.prune import alps, magnitude, sparsegpt, wanda
from limbeck.compress.prune.alps import AlpsConfig
from limbeck.compress.prune.magnitude import MagnitudeConfig
from limbeck.compress.prune.methods import Solve, Sparsify, Structured
from limbeck.compress.prune.osscar import OsscarConfig
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.prune.sparsegpt import SparseGPTConfig
from limbeck.compress.prune.wanda import WandaConfig
from limbeck.compress.shrink import shrunk_config
from limbeck.compress.stage import Finish, Job, compress, parameters_of
from limbeck.compress.walk import Method, Record, WalkOptions
from limbeck.compress.weights import SafetensorSource
from limbeck.errors import ConfigError, nearest

SOLVERS: dict[str, Callable[..., torch.Tensor]] = {
    "magnitude": magnitude.solve,
    "wanda": wanda.solve,
    "sparsegpt": sparsegpt.solve,
    "alps": alps.solve,
}
METHODS = (*SOLVERS, "osscar")


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneConfig:
    """Prune a model: whole neurons and KV groups (osscar), or single weights (the other methods)."""

    model: str
    """Directory, alias (tiny-teacher, tiny-student, smollm2-135m) or hub id."""
    method: str = "osscar"
    """osscar | alps | sparsegpt | wanda | magnitude."""
    neuron_sparsity: float = 0.25
    """Share of the MLP neurons to remove (osscar)."""
    kv_group_sparsity: float = 0.0
    """Share of the KV groups to remove, each with its query heads (osscar)."""
    multiple_of: int = 32
    """The neurons that stay are a multiple of this, for the kernels of engines (osscar)."""
    pattern: str = "0.5"
    """Share of zeros, or N:M, N of every M inputs stay (all but osscar)."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Tokens that the layers are shown."""
    moments: Path | None = None
    """Moments collected by `limbeck moments`: solve from them, without passing through the model again."""
    dense_targets: bool = False
    """Let every layer aim at the dense model's output, so that later layers repair earlier damage."""
    ignore: tuple[str, ...] = ()
    """Layers whose name contains one of these are left as they are."""
    alps: AlpsConfig = field(default_factory=AlpsConfig)
    """Settings of alps."""
    sparsegpt: SparseGPTConfig = field(default_factory=SparseGPTConfig)
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
        if self.multiple_of < 1:
            raise ConfigError(f"multiple_of must be 1 or more; found {self.multiple_of}")
        if self.moments is not None and self.dense_targets:
            raise ConfigError("dense_targets needs the walk; stored moments are those of the dense model already.")


def run(config: PruneConfig, out: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Prune a model and write the checkpoint; returns its metrics.

    Raises: ConfigError, ModelError or CompressionError when the model cannot be pruned as asked.
    """
    blocks = Blocks(config.model)
    options = WalkOptions("prune", config.dense_targets, config.ignore)
    job = Job("prune", config.model, config, config.calibration, config.moments, options, config.method != "magnitude")
    method: Method
    finish: Finish = _write_mask
    if config.method == "osscar":
        method = Structured(
            blocks.config, config.neuron_sparsity, config.kv_group_sparsity, config.multiple_of, config.osscar
        )
        finish = _smaller_config(blocks.config, method)
    else:
        method = Sparsify(_solver(config))
    return compress(job, blocks, method, out, overwrite=overwrite, resume=resume, finish=finish)


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


def _smaller_config(config: Any, method: Structured) -> Finish:
    def finish(directory: Path, records: list[Record]) -> dict[str, Any]:
        shrunk_config(config, neurons=method.neurons, kv_groups=method.kv_groups).save_pretrained(directory)
        return {
            "parameters": parameters_of(directory),
            "neurons": [method.all_neurons, method.neurons],
            "kv_groups": [method.all_groups, method.kv_groups],
        }

    return finish
