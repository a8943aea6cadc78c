"""Quantisation schemes: what a checkpoint's `quantization_config` says, and which tensors a linear layer becomes.

    scheme        weights                              inputs                             format
    w2a16-w8a16   int, a scale a group of inputs       as they are                        pack-quantized
    w8a8          int8, a scale an output channel      int8, a scale a token, as it comes int-quantized
    fp8-dynamic   E4M3, a scale an output channel      E4M3, a scale a token, as it comes float-quantized
    fp8-static    E4M3, one scale                      E4M3, one scale, fixed             float-quantized
    nvfp4a16      E2M1, an E4M3 scale 16 inputs and    as they are                        nvfp4-pack-quantized
                  one float32 scale for the layer
    mxfp4a16      E2M1, a power of two 32 inputs       as they are                        mxfp4-pack-quantized

All are symmetric: asymmetric int4 fails in transformers, and no engine needs it. `quantization_status: compressed` is
always there, since without it transformers loads the file and computes with wrong weights. Nothing is said of sparsity:
engines refuse checkpoints that do.
Source: the compressed-tensors checkpoint format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.errors import CompressionError, ConfigError, ModelError, nearest
from limbeck.models import fp4
from limbeck.models.packing import pack, unpack

STATUS = "compressed"
KV_CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
"""Keys and values as E4M3 with one fixed scale a layer each, the tensors `self_attn.k_scale` and `v_scale`, [1]."""
SUFFIXES = ("weight_packed", "weight_shape", "weight_scale", "weight_global_scale", "input_scale", "weight")
"""What may follow a quantised layer's name, but for its bias."""


_NEEDED = {
    "pack-quantized": ("weight_packed", "weight_shape", "weight_scale"),
    "nvfp4-pack-quantized": ("weight_packed", "weight_scale", "weight_global_scale"),
    "mxfp4-pack-quantized": ("weight_packed", "weight_scale"),
}
"""Tensors of a layer by format, where they are not its weight and one scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """How a linear layer is stored and what happens to its inputs."""

    bits: int = 4
    """Width of a weight's code, 2 to 8."""
    kind: str = "int"
    """int | float (8 bits: E4M3; 4 bits: E2M1), of weights and inputs."""
    strategy: str = "group"
    """group | channel | tensor: what shares a scale of the weights; tensor_group: groups within one global scale."""
    group_size: int | None = 128
    """Inputs that share a scale; null unless the strategy is group."""
    activations: str | None = None
    """null: inputs stay; dynamic: 8 bits, a scale a token; static: 8 bits, one fixed scale (`input_scale`)."""

    @property
    def format(self) -> str:
        """The name that compressed-tensors has for the storage."""
        if self.kind == "float" and self.bits == 4:
            return "nvfp4-pack-quantized" if self.strategy == "tensor_group" else "mxfp4-pack-quantized"
        if self.kind == "float":
            return "float-quantized"
        return "pack-quantized" if self.activations is None else "int-quantized"

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """Of the stored scales; None where they have the dtype of the other weights."""
        dtypes = {"nvfp4-pack-quantized": torch.float8_e4m3fn, "mxfp4-pack-quantized": torch.float8_e8m0fnu}
        return dtypes.get(self.format)

    @property
    def largest_code(self) -> int | None:
        """Largest magnitude of a code that is written; null: the whole width.

        int8 weights that meet int8 inputs stay in -63..63, so that AVX2's 16-bit sums of two products cannot overflow
        and one file gives the same numbers everywhere.
        """
        return 63 if self.format == "int-quantized" else None


SCHEMES = {
    **{f"w{bits}a16": Scheme(bits=bits) for bits in range(2, 9)},
    "w8a8": Scheme(bits=8, strategy="channel", group_size=None, activations="dynamic"),
    "fp8-dynamic": Scheme(bits=8, kind="float", strategy="channel", group_size=None, activations="dynamic"),
    "fp8-static": Scheme(bits=8, kind="float", strategy="tensor", group_size=None, activations="static"),
    "nvfp4a16": Scheme(bits=4, kind="float", strategy="tensor_group", group_size=16),
    "mxfp4a16": Scheme(bits=4, kind="float", group_size=32),
}


def scheme_of(name: str, group_size: int | None = 128) -> Scheme:
    """The scheme of a name; `group_size` is that of the schemes with groups, null for a scale an output channel.

    Raises: ConfigError for an unknown name.
    """
    if name not in SCHEMES:
        raise ConfigError(f"scheme {name!r} is unknown; {nearest(name, SCHEMES)}.")
    scheme = SCHEMES[name]
    if scheme.strategy != "group" or scheme.scale_dtype is not None:
        return scheme
    return replace(scheme, group_size=group_size, strategy="channel" if group_size is None else "group")


def takes_group_size(name: str) -> bool:
    """Whether the group size of a scheme is a choice."""
    return scheme_of(name, 1).group_size == 1


def check_dtype(scheme: Scheme, dtype: torch.dtype, name: str) -> None:
    """Refuse four-bit floats beside weights that are not bfloat16, the type in which compressed-tensors unpacks them.

    Raises: CompressionError.
    """
    if scheme.scale_dtype is not None and dtype != torch.bfloat16:
        raise CompressionError(
            f"{name}: {scheme.format} goes with bfloat16 alone, and the model is {str(dtype).removeprefix('torch.')}; "
            "write it so first (`limbeck export --format dense --dtype bfloat16`)."
        )


def config_of(
    scheme: Scheme | Mapping[str, Scheme], ignore: Sequence[str] = ("lm_head",), *, kv_cache: bool = False
) -> dict[str, Any]:
    """`quantization_config` of a checkpoint.

    Args:
      scheme: one for all linear layers that are not in `ignore`, or module name -> its own (mixed precision).
      ignore: module names of the linear layers that stay dense.
      kv_cache: whether keys and values are stored as E4M3, with `k_scale` and `v_scale` beside the layers.
    """
    if isinstance(scheme, Scheme):
        targets: dict[Scheme, list[str]] = {scheme: ["Linear"]}
    else:
        targets = {}
        for name, own in scheme.items():
            targets.setdefault(own, []).append(name)
    formats = {own.format for own in targets}
    groups = {f"group_{number}": _group(own, names) for number, (own, names) in enumerate(targets.items())}
    return {
        "quant_method": "compressed-tensors",
        "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
        "quantization_status": STATUS,
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": dict(KV_CACHE_SCHEME) if kv_cache else None,
        "global_compression_ratio": None,
    }


def _group(scheme: Scheme, targets: Sequence[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "strategy": scheme.strategy,
        "symmetric": True,
        "dynamic": False,
    }
    if scheme.group_size is not None:
        weights["group_size"] = scheme.group_size
    if scheme.scale_dtype is not None:
        stored = torch.uint8 if scheme.scale_dtype == torch.float8_e8m0fnu else scheme.scale_dtype
        weights["scale_dtype"] = str(stored)
    inputs = None
    if scheme.activations is not None:
        inputs = {
            "num_bits": 8,
            "type": scheme.kind,
            "strategy": "token" if scheme.activations == "dynamic" else "tensor",
            "symmetric": True,
            "dynamic": scheme.activations == "dynamic",
        }
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": scheme.format,
    }


def tensors_of(
    prefix: str,
    codes: Tensor,
    scales: Tensor,
    scheme: Scheme,
    dtype: torch.dtype = torch.bfloat16,
    input_scale: float | Tensor | None = None,
    global_scale: float = 1.0,
) -> dict[str, Tensor]:
    """The tensors that stand for a quantised linear layer's weight.

    Args:
      prefix: the layer's name; empty for bare suffixes.
      codes: int8 or float8_e4m3fn [O I].
      scales: float [O G]; G groups of inputs, 1 for the other strategies (one value throughout for `tensor`).
      scheme: what they were rounded for.
      dtype: of the scales, that of the model's other weights.
      input_scale: of static activations; its largest input is input_scale * 448.
      global_scale: that scales were rounded with (`tensor_group`).
    Raises: CompressionError when they do not fit together.
    """
    where = f"{prefix}." if prefix else ""
    checked = _stored_scales(prefix, codes, scales, scheme)
    if scheme.scale_dtype is not None:
        return {f"{where}{suffix}": tensor for suffix, tensor in _fp4_tensors(codes, checked, global_scale, scheme)}
    stored = checked.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise CompressionError(f"{prefix}: scales do not fit into {dtype}; store the checkpoint in another dtype.")
    tensors = {f"{where}weight_scale": stored}
    if scheme.format == "pack-quantized":
        tensors[f"{where}weight_packed"] = pack(codes, scheme.bits)
        tensors[f"{where}weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
    else:
        tensors[f"{where}weight"] = codes.contiguous()
    if scheme.activations == "static":
        if input_scale is None:
            raise CompressionError(f"{prefix}: static activations need an input_scale, which calibration gives.")
        tensors[f"{where}input_scale"] = torch.as_tensor(input_scale, dtype=dtype).reshape(1)
    return tensors


def _stored_scales(prefix: str, codes: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    expected = torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn
    if codes.ndim != 2 or not codes.numel() or codes.dtype != expected:
        raise CompressionError(f"{prefix}: codes {codes.dtype} {list(codes.shape)}; expected {expected} [O I].")
    outputs, inputs = codes.shape
    size = scheme.group_size or inputs
    if inputs % size or scales.shape != (outputs, inputs // size):
        raise CompressionError(
            f"{prefix}: codes {[outputs, inputs]} and scales {list(scales.shape)} do not make groups of {size} inputs; "
            "choose a group_size that divides the inputs."
        )
    if scheme.strategy != "tensor":
        return scales
    if not bool((scales == scales[0, 0]).all()):
        raise CompressionError(f"{prefix}: the scheme has one scale for the whole layer; found several.")
    return scales[:1, 0]


def _fp4_tensors(codes: Tensor, scales: Tensor, global_scale: float, scheme: Scheme) -> Iterator[tuple[str, Tensor]]:
    yield "weight_packed", fp4.pack(codes)
    if scheme.strategy == "tensor_group":
        yield "weight_scale", (scales * global_scale).to(torch.float8_e4m3fn)
        yield "weight_global_scale", torch.tensor([global_scale])
    else:
        yield "weight_scale", fp4.to_exponents(scales)


def _fp4_weight(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes, and scales in float32."""
    scales = tensors["weight_scale"]
    if scheme.strategy == "tensor_group":
        return fp4.unpack(tensors["weight_packed"]), scales.float() / tensors["weight_global_scale"].float()
    return fp4.unpack(tensors["weight_packed"]), fp4.from_exponents(scales)


class StoredWeight(NamedTuple):
    """A quantised layer's weight as it is stored: codes times scales."""

    codes: Tensor
    """int8 or float8_e4m3fn [O I]."""
    scales: Tensor
    """[O G], in the dtype of the file."""
    scheme: Scheme


def stored_weight(tensors: Mapping[str, Tensor], scheme: Scheme, where: str) -> StoredWeight:
    """Codes and scales of a layer.

    Args:
      tensors: by suffix, as `tensors_of` gives them for an empty prefix.
      where: the layer's name, for messages.
    Raises: ModelError when a tensor is missing or has another shape than its scheme says.
    """
    for suffix in _NEEDED.get(scheme.format, ("weight", "weight_scale")):
        if suffix not in tensors:
            raise ModelError(f"{where}: no tensor {suffix}, which format {scheme.format} has; the file is damaged.")
    if scheme.format == "pack-quantized":
        codes = unpack(tensors["weight_packed"], scheme.bits, int(tensors["weight_shape"][1]))
        scales = tensors["weight_scale"]
    elif scheme.scale_dtype is not None:
        codes, scales = _fp4_weight(tensors, scheme)
    else:
        codes, scales = tensors["weight"], tensors["weight_scale"]
    outputs, inputs = codes.shape
    groups = inputs // scheme.group_size if scheme.group_size else 1
    shape = (1,) if scheme.strategy == "tensor" else (outputs, groups)
    if scales.shape != shape or groups == 0 or inputs % groups:
        raise ModelError(
            f"{where}: scales {list(scales.shape)} for weight {[outputs, inputs]}; its scheme has {list(shape)}."
        )
    return StoredWeight(codes, scales.reshape(-1, groups).expand(outputs, groups), scheme)


def weight_of(stored: StoredWeight, dtype: torch.dtype) -> Tensor:
    """The dense weight [O I]: code * scale, the scale first rounded to `dtype` where it is stored in such a one."""
    outputs, inputs = stored.codes.shape
    grouped = stored.codes.to(torch.float32).view(outputs, stored.scales.shape[1], -1)
    scales = stored.scales.float() if stored.scheme.scale_dtype else stored.scales.to(dtype).float()
    return (grouped * scales[:, :, None]).view(outputs, inputs).to(dtype)
