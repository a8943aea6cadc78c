"""The stage `quantize`: a model in, a compressed-tensors checkpoint out, which transformers, vLLM and SGLang read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

from limbeck.checkpoint import Checkpoint, write_json
from limbeck.compress.blocks import Blocks
from limbeck.compress.calibrate import CalibrationConfig
from limbeck.compress.fidelity import GateConfig
from limbeck.compress.moments import stored_or_collected
from limbeck.compress.problem import LayerProblem
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.quantize import awq, gptq, joint, quantease, rtn, smoothquant
from limbeck.compress.quantize.awq import AwqConfig
from limbeck.compress.quantize.budget import MixedConfig, choose_schemes
from limbeck.compress.quantize.gptq import GptqConfig
from limbeck.compress.quantize.grid import Grid, Quantized
from limbeck.compress.quantize.joint import JointConfig
from limbeck.compress.quantize.methods import Equalize, Quantize
from limbeck.compress.quantize.quantease import QuantEaseConfig
from limbeck.compress.quantize.rtn import RtnConfig
from limbeck.compress.quantize.smoothquant import SmoothQuantConfig
from limbeck.compress.stage import Job, compress
from limbeck.compress.walk import Record, WalkOptions
from limbeck.config import checked
from limbeck.errors import ConfigError, nearest
from limbeck.models.schemes import Scheme, config_of, scheme_of
from limbeck.stage import How

SOLVERS: dict[str, Callable[..., Quantized]] = {"rtn": rtn.solve, "gptq": gptq.solve, "quantease": quantease.solve}
EQUALIZERS: dict[str, Callable[..., Any]] = {"awq": awq.factors, "smoothquant": smoothquant.factors}


@checked
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
    mixed: MixedConfig | None = None
    """Several widths, chosen by layer for a number of bits a weight, instead of `scheme`."""
    pattern: str | None = None
    """Prune as well, support and codes found together: share of zeros or N:M. Null keeps all weights."""
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
    joint: JointConfig = field(default_factory=JointConfig)
    """Settings of pruning and quantising together."""
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
        if self.pattern is not None:
            Pattern.parse(self.pattern)
        if self.moments is not None and self.dense_targets:
            raise ConfigError("dense_targets needs the walk; stored moments are those of the dense model already.")

    @property
    def needs_data(self) -> bool:
        """Whether any part of it looks at the inputs of layers."""
        return (
            self.method != "rtn"
            or self.pattern is not None
            or self.equalization != "none"
            or self.rtn.clip == "moments"
        )


def run(config: QuantizeConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Quantise a model and write the checkpoint.

    Raises: ConfigError, ModelError or CompressionError when the model cannot be quantised as asked.
    """
    blocks = Blocks(config.model)
    options = WalkOptions("quantize", config.dense_targets, config.ignore)
    schemes = _schemes(config, blocks, options)
    needs_data = config.needs_data or any(scheme.activations == "static" for scheme in schemes.values())
    job = Job(
        "quantize",
        config.model,
        config,
        config.calibration,
        config.moments,
        options,
        config.gate,
        config.method,
        needs_data,
    )
    method = Quantize(schemes.__getitem__, _rounding(config), _equalizer(config), lambda name: blocks.dtypes[name])

    def finish(directory: Path, records: list[Record]) -> dict[str, Any]:
        solved = [record.name for record in records]
        dense = ["lm_head", *(f"model.{name}" for name in blocks.linear_names() if name not in solved)]
        used = {f"model.{name}": schemes[name] for name in solved}
        kinds = set(used.values())
        path = directory / "config.json"
        tree = json.loads(path.read_text(encoding="utf-8"))
        stored = config_of(kinds.pop() if len(kinds) == 1 else used, dense)
        write_json(path, tree | {"quantization_config": stored})
        return {"scheme": config.scheme if config.mixed is None else "mixed"}

    return compress(job, blocks, method, out, how=how, finish=finish)


def _schemes(config: QuantizeConfig, blocks: Blocks, options: WalkOptions) -> dict[str, Scheme]:
    """The scheme of every linear layer."""
    if config.mixed is None:
        scheme = scheme_of(config.scheme, config.group_size)
        return dict.fromkeys(blocks.linear_names(), scheme)
    with stored_or_collected(config.moments, config.model, config.calibration) as moments:
        return choose_schemes(blocks, moments, config.mixed, config.group_size, options.chosen)


def _rounding(config: QuantizeConfig) -> Callable[[LayerProblem, Grid], Quantized]:
    if config.pattern is not None:
        pattern = Pattern.parse(config.pattern)
        return lambda problem, grid: joint.solve(problem, pattern, grid, config.joint)
    solve, settings = SOLVERS[config.method], getattr(config, config.method)
    return lambda problem, grid: solve(problem, grid, settings)


def _equalizer(config: QuantizeConfig) -> Equalize | None:
    if config.equalization == "none":
        return None
    factors, settings = EQUALIZERS[config.equalization], getattr(config, config.equalization)
    return lambda problems, grid: factors(problems, grid, settings)
