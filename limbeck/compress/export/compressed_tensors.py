"""Writing compressed-tensors checkpoints, for transformers, vLLM and SGLang, without the library.

A model that `limbeck quantize` made is carried over bit by bit. A dense one is rounded to nearest on the way, which
needs no data; that is good enough for 8 bits, and for 4 bits `limbeck quantize` does better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.checkpoint import write_json
from limbeck.compress.export.shards import config_tree, is_tied, write_shards
from limbeck.compress.quantize.grid import encode, storable
from limbeck.compress.quantize.methods import grid_of
from limbeck.compress.weights import narrowed
from limbeck.errors import CompressionError
from limbeck.models.anatomy import backbone_of
from limbeck.models.kv_quant import cache_scales
from limbeck.models.load import locate, quantization_at
from limbeck.models.quantized import read_tensors
from limbeck.models.schemes import KV_CACHE_SCHEME, Scheme, check_dtype, config_of, tensors_of


def _check_scheme(name: str, scheme: Scheme | None) -> None:
    is_quantized = quantization_at(name) is not None
    if is_quantized and scheme is not None:
        raise CompressionError(
            f"{name}: is quantised already; leave scheme out, or export the model that it was made of."
        )
    if not is_quantized and scheme is None:
        raise CompressionError(
            f"{name}: is not quantised; set scheme to round it to nearest, or run limbeck quantize first."
        )


def write_compressed(
    directory: Path,
    name: str,
    model: Any,
    scheme: Scheme | None,
    dtype: torch.dtype | None = None,
    cache_batches: list[Tensor] | None = None,
) -> int:
    """Write a quantised checkpoint (weights and config.json).

    Args:
      directory: an existing one.
      name: of the model; `model` is what `load_model` made of it.
      scheme: to round a dense model to; None for one that is quantised.
      dtype: of scales and of dense weights; None keeps that of the model or of its file.
      cache_batches: int64 [B T] each; with them keys and values get fixed E4M3 scales from what these contain.
    Returns: the bytes of all tensors.
    Raises: CompressionError when there is nothing to write, or a layer does not fit the scheme.
    """
    _check_scheme(name, scheme)
    scales = {} if cache_batches is None else cache_scales(model, cache_batches)
    tree = config_tree(name, model)
    if scheme is None:
        stored = read_tensors(Path(locate(name).path)) | scales
        tensors: Iterable[tuple[str, Tensor]] = stored.items()
        if dtype is not None:
            tensors = ((layer, _recast(layer, tensor, dtype)) for layer, tensor in stored.items())
            tree = tree | {"dtype": str(dtype).removeprefix("torch.")}
    else:
        dtype = dtype or next(model.parameters()).dtype
        check_dtype(scheme, dtype, name)
        chosen = [layer for layer, module in backbone_of(model).named_modules() if isinstance(module, nn.Linear)]
        _refuse_experts(name, model)
        tensors = _rounded(model, {f"model.{layer}" for layer in chosen}, scheme, dtype, scales)
        tree |= {"quantization_config": config_of(scheme), "dtype": str(dtype).removeprefix("torch.")}
    if scales:
        tree["quantization_config"]["kv_cache_scheme"] = dict(KV_CACHE_SCHEME)
    total = write_shards(directory, tensors)
    write_json(directory / "config.json", tree)
    return total


def _rounded(
    model: Any, layers: set[str], scheme: Scheme, dtype: torch.dtype, scales: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if name == "lm_head.weight" and is_tied(model):
            continue
        if layer not in layers or not name.endswith(".weight"):
            yield name, narrowed(name, tensor, dtype)
            continue
        if scheme.activations == "static":
            raise CompressionError(f"{layer}: fixed activation scales need data; run limbeck quantize for fp8-static.")
        if scheme.strategy == "tensor_group":
            raise CompressionError(
                f"{layer}: layers that engines fuse share one global scale; run `limbeck quantize --scheme nvfp4a16 "
                "--method rtn`, which needs no data either."
            )
        grid = grid_of(scheme, dtype)
        found = encode(tensor, grid.scales(tensor, layer), grid)
        yield from tensors_of(layer, found.codes, found.scales, scheme, dtype).items()
    yield from ((name, storable(scale, dtype).to(dtype)) for name, scale in scales.items())


def _recast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense weight or a scale in another dtype; codes as they are.

    Raises: CompressionError where the dtype has no number for it.
    """
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return tensor
    stored = narrowed(name, tensor, dtype)
    if name.endswith("_scale") and bool((stored == 0).any()):
        raise CompressionError(f"{name}: {float(tensor.min()):.3g} is zero in {dtype}; choose bfloat16 or float32.")
    return stored


def _refuse_experts(name: str, model: Any) -> None:
    for parameter, tensor in model.state_dict().items():
        if tensor.ndim == 3:
            raise CompressionError(f"{name}: {parameter} holds experts, which are not quantised; export it dense.")
