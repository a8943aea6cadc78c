"""The stage `quantize`: a model in, a compressed-tensors checkpoint out, which transformers, vLLM and SGLang read."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any

from limbeck.checkpoint import Checkpoint, write_json
from limbeck.compress.blocks import Blocks
from limbeck.compress.method import Record
from limbeck.compress.moments import stored_or_collected
from limbeck.compress.prune.pattern import Pattern
from limbeck.compress.quantize import awq, gptq, joint, quantease, rtn, smoothquant
from limbeck.compress.quantize.awq import AwqConfig
from limbeck.compress.quantize.budget import MixedConfig, choose_schemes
from limbeck.compress.quantize.fused import parted
from limbeck.compress.quantize.gptq import GptqConfig
from limbeck.compress.quantize.grid import Quantized
from limbeck.compress.quantize.joint import JointConfig
from limbeck.compress.quantize.methods import Equalize, Quantize, Round
from limbeck.compress.quantize.quantease import QuantEaseConfig
from limbeck.compress.quantize.rtn import RtnConfig
from limbeck.compress.quantize.smoothquant import SmoothQuantConfig
from limbeck.compress.stage import CompressConfig, Job, compress
from limbeck.config import checked, only
from limbeck.errors import ConfigError, nearest
from limbeck.models.schemes import Scheme, check_dtype, config_of, scheme_of, takes_group_size
from limbeck.progress import console
from limbeck.stage import How

SOLVERS: dict[str, Callable[..., Quantized]] = {"rtn": rtn.solve, "gptq": gptq.solve, "quantease": quantease.solve}
EQUALIZERS: dict[str, Callable[..., Any]] = {"awq": awq.factors, "smoothquant": smoothquant.factors}


DEFAULT_GROUP = 128
EXPERTS = r"re:.*\bexperts\..*"
"""Matches experts by whatever name an engine has for them."""


@checked
class QuantizeConfig(CompressConfig):
    """Quantise a model's linear layers; embeddings and head stay as they are."""

    scheme: str = "w4a16"
    """w2a16 to w8a16 (weights only, groups) | w8a8 (int8, inputs a token) | fp8-dynamic | fp8-static | nvfp4a16,
    mxfp4a16 (weights only, four-bit floats)."""
    group_size: int | None = DEFAULT_GROUP
    """Inputs that share a scale in the weight-only schemes; must divide the inputs of every layer. Null: one a row."""
    method: str = "quantease"
    """quantease | gptq | rtn."""
    equalization: str = "none"
    """none | awq | smoothquant: scale inputs against weights before rounding, folded into the norm before."""
    mixed: MixedConfig | None = None
    """Several widths, chosen by layer for a number of bits a weight, instead of `scheme`."""
    pattern: str | None = None
    """Prune as well, support and codes found together: share of zeros or N:M. Null keeps all weights."""
    joint: JointConfig = field(default_factory=JointConfig)
    """Settings of pruning and quantising together."""
    rtn: RtnConfig = only("method", "rtn", default_factory=RtnConfig)
    """Settings of rtn."""
    gptq: GptqConfig = only("method", "gptq", default_factory=GptqConfig)
    """Settings of gptq."""
    quantease: QuantEaseConfig = only("method", "quantease", default_factory=QuantEaseConfig)
    """Settings of quantease."""
    awq: AwqConfig = only("equalization", "awq", default_factory=AwqConfig)
    """Settings of awq."""
    smoothquant: SmoothQuantConfig = only("equalization", "smoothquant", default_factory=SmoothQuantConfig)
    """Settings of smoothquant."""

    def __post_init__(self) -> None:
        CompressConfig.__post_init__(self)
        if self.method not in SOLVERS:
            raise ConfigError(f"method: unknown {self.method!r}; {nearest(self.method, SOLVERS)}")
        if self.equalization not in ("none", *EQUALIZERS):
            known = ("none", *EQUALIZERS)
            raise ConfigError(f"equalization: unknown {self.equalization!r}; {nearest(self.equalization, known)}")
        has_groups = self.mixed is not None or takes_group_size(self.scheme)
        if not has_groups and self.group_size not in (None, DEFAULT_GROUP):
            raise ConfigError(f"group_size {self.group_size}: {self.scheme} shares its scales as it must; leave it out")
        if self.pattern is not None:
            Pattern.parse(self.pattern)

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
    schemes = _schemes(config, blocks)
    for scheme in set(schemes.values()):
        check_dtype(scheme, blocks.config.dtype, config.model)
    needs_data = config.needs_data or any(scheme.activations == "static" for scheme in schemes.values())
    pattern = None if config.pattern is None else Pattern.parse(config.pattern)
    rounding, settings = _rounding(config, pattern)
    method = Quantize(schemes, rounding, settings, _equalizer(config), lambda name: blocks.dtypes[name], pattern)
    finish = partial(_write_scheme, config, blocks, schemes)
    _say_unfused(blocks, schemes, config.ignore)
    job = Job("quantize", config, blocks, method, needs_data, finish)
    return compress(job, out, how)


def _write_scheme(
    config: QuantizeConfig, blocks: Blocks, schemes: dict[str, Scheme], directory: Path, records: list[Record]
) -> dict[str, Any]:
    solved = [record.name for record in records]
    used = {f"model.{name}": schemes[name] for name in solved}
    kinds = set(used.values())
    path = directory / "config.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    stored = config_of(kinds.pop() if len(kinds) == 1 else used, dense_names(blocks, solved))
    if EXPERTS in stored["ignore"]:
        stored = _with_dense_experts(stored)
    write_json(path, tree | {"quantization_config": stored})
    return {"scheme": config.scheme if config.mixed is None else "mixed"}


def _with_dense_experts(stored: dict[str, Any]) -> dict[str, Any]:
    """For transformers, which does not look whether experts are ignored and reads them by the group that names them.

    That one must be E4M3, the only kind whose weights may lack a scale. Other engines never come to it.
    """
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    experts = {"targets": [EXPERTS], "weights": weights, "input_activations": None, "output_activations": None}
    groups = stored["config_groups"] | {"experts": experts | {"format": "float-quantized"}}
    return stored | {"format": "mixed-precision", "config_groups": groups}


def dense_names(blocks: Blocks, solved: Collection[str]) -> list[str]:
    """What engines must not look for codes of: the head, layers left out, routers, and experts by a pattern.

    A router is a linear layer in some engines only, and under the name in the file.
    """
    matrices = blocks.matrices()
    dense = [name for name in matrices if "experts." not in name and name not in solved]
    in_file = (name.removesuffix(".weight") for name in blocks.stored_names(dense))
    names = dict.fromkeys([*(f"model.{name}" for name in dense), *in_file])
    return ["lm_head", *names, *([EXPERTS] if any("experts." in name for name in matrices) else [])]


def _say_unfused(blocks: Blocks, schemes: dict[str, Scheme], ignore: Sequence[str]) -> None:
    """Some engines compute query, key and value as one layer, and gate and up, so none may differ from the others."""
    used = {name: scheme for name, scheme in schemes.items() if not any(part in name for part in ignore)}
    for name in parted(blocks.linear_names(), used):
        console.print(f"quantize: {name}", highlight=False)


def _schemes(config: QuantizeConfig, blocks: Blocks) -> dict[str, Scheme]:
    """The scheme of every linear layer."""
    if config.mixed is None:
        scheme = scheme_of(config.scheme, config.group_size)
        return dict.fromkeys(blocks.linear_names(), scheme)
    with stored_or_collected(config.moments, config.model, config.calibration) as moments:
        return choose_schemes(blocks, moments, config.mixed, config.group_size, config.ignore)


def _rounding(config: QuantizeConfig, pattern: Pattern | None) -> tuple[Round, Any]:
    """The solver and its settings."""
    if pattern is None:
        return SOLVERS[config.method], getattr(config, config.method)
    return partial(joint.solve, pattern=pattern), config.joint


def _equalizer(config: QuantizeConfig) -> Equalize | None:
    if config.equalization == "none":
        return None
    factors, settings = EQUALIZERS[config.equalization], getattr(config, config.equalization)
    return lambda problems, grid: factors(problems, grid, settings)
