"""The stage `quantize`: a model in, a compressed-tensors checkpoint out, which transformers, vLLM and SGLang read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.checkpoint import write_json
from limbeck.compress.blocks import Blocks
from limbeck.compress.calibrate import CalibrationConfig
from limbeck.compress.problem import LayerProblem
from limbeck.compress.quantize import awq, gptq, quantease, rtn, smoothquant
from limbeck.compress.quantize.awq import AwqConfig
from limbeck.compress.quantize.gptq import GptqConfig
from limbeck.compress.quantize.grid import Grid, Quantized
from limbeck.compress.quantize.methods import Equalize, Quantize
from limbeck.compress.quantize.quantease import QuantEaseConfig
from limbeck.compress.quantize.rtn import RtnConfig
from limbeck.compress.quantize.smoothquant import SmoothQuantConfig
from limbeck.compress.stage import Job, compress
from limbeck.compress.walk import Record, WalkOptions
from limbeck.errors import ConfigError, nearest
from limbeck.models.schemes import config_of, scheme_of

SOLVERS: dict[str, Callable[..., Quantized]] = {"rtn": rtn.solve, "gptq": gptq.solve, "quantease": quantease.solve}
EQUALIZERS: dict[str, Callable[..., Any]] = {"awq": awq.factors, "smoothquant": smoothquant.factors}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeConfig:
    """Quantise a model's linear layers; embeddings and head stay as they are."""

    model: str
    """Directory, alias (tiny-teacher, tiny-student, smollm2-135m) or hub id."""
    scheme: str = "w4a16"
    """w2a16 to w8a16 (weights only, groups) | w8a8 (int8, inputs a token) | fp8-dynamic | fp8-static."""
    group_size: int | None = 128
    """Inputs that share a scale in the weight-only schemes; must divide the inputs of every layer. Null: one a row."""
    method: str = "quantease"
    """quantease | gptq | rtn."""
    equalization: str = "none"
    """none | awq | smoothquant: scale inputs against weights before rounding, folded into the norm before."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Tokens that the layers are shown."""
    moments: Path | None = None
    """Moments collected by `limbeck moments`: solve from them, without passing through the model again."""
    dense_targets: bool = False
    """Let every layer aim at the dense model's output, so that later layers repair earlier damage."""
    ignore: tuple[str, ...] = ()
    """Layers whose name contains one of these are left as they are."""
    rtn: RtnConfig = field(default_factory=RtnConfig)
    """Settings of rtn."""
    gptq: GptqConfig = field(default_factory=GptqConfig)
    """Settings of gptq."""
    quantease: QuantEaseConfig = field(default_factory=QuantEaseConfig)
    """Settings of quantease."""
    awq: AwqConfig = field(default_factory=AwqConfig)
    """Settings of awq."""
    smoothquant: SmoothQuantConfig = field(default_factory=SmoothQuantConfig)
    """Settings of smoothquant."""

    def __post_init__(self) -> None:
        if self.method not in SOLVERS:
            raise ConfigError(f"method: unknown {self.method!r}; {nearest(self.method, SOLVERS)}")
        if self.equalization not in ("none", *EQUALIZERS):
            known = ("none", *EQUALIZERS)
            raise ConfigError(f"equalization: unknown {self.equalization!r}; {nearest(self.equalization, known)}")
        scheme_of(self.scheme, self.group_size)
        if self.moments is not None and self.dense_targets:
            raise ConfigError("dense_targets needs the walk; stored moments are those of the dense model already.")

    @property
    def needs_data(self) -> bool:
        """Whether any part of it looks at the inputs of layers."""
        return self.method != "rtn" or self.equalization != "none" or self.rtn.clip == "moments"


def run(config: QuantizeConfig, out: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Quantise a model and write the checkpoint; returns its metrics.

    Raises: ConfigError, ModelError or CompressionError when the model cannot be quantised as asked.
    """
    blocks = Blocks(config.model)
    scheme = scheme_of(config.scheme, config.group_size)
    options = WalkOptions("quantize", config.dense_targets, config.ignore)
    needs_data = config.needs_data or scheme.activations == "static"
    job = Job("quantize", config.model, config, config.calibration, config.moments, options, needs_data)
    method = Quantize(lambda name: scheme, _rounding(config), _equalizer(config))

    def finish(directory: Path, records: list[Record]) -> dict[str, Any]:
        solved = {record.name for record in records}
        dense = ["lm_head", *(f"model.{name}" for name in blocks.linear_names() if name not in solved)]
        path = directory / "config.json"
        tree = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, tree | {"quantization_config": config_of(scheme, dense)})
        return {"scheme": config.scheme}

    return compress(job, blocks, method, out, overwrite=overwrite, resume=resume, finish=finish)


def _rounding(config: QuantizeConfig) -> Callable[[LayerProblem, Grid], Quantized]:
    solve, settings = SOLVERS[config.method], getattr(config, config.method)
    return lambda problem, grid: solve(problem, grid, settings)


def _equalizer(config: QuantizeConfig) -> Equalize | None:
    if config.equalization == "none":
        return None
    factors, settings = EQUALIZERS[config.equalization], getattr(config, config.equalization)
    return lambda problems, grid: factors(problems, grid, settings)
