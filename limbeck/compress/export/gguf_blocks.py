"""The weights of a model in the types of a GGUF file; see `gguf`."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.compress.export.shards import is_tied
from limbeck.errors import CompressionError
from limbeck.models.load import load_model, locate, quantization_at
from limbeck.models.quantized import read_tensors, split_tensors
from limbeck.models.schemes import StoredWeight

TYPES = ("f16", "q8_0", "q4_0")
BLOCK = 32
"""Weights of a row that share a scale."""
_LARGEST = {"f32": 3.4e38, "f16": 65504.0, "q8_0": 65504.0 * 127, "q4_0": 65504.0 * 8}
"""Largest weight that a type holds: scales are float16."""


def library() -> Any:
    """The gguf package.

    Raises: CompressionError when it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CompressionError("GGUF files are written with the gguf package: pip install gguf.")
    return importlib.import_module("gguf")


class SourceWeights:
    """The weights of a model by transformers' names: dense, and as codes where they are stored so."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, load_model(name, torch.float32, device="cpu", rounds=False, whole=True)
        self.config = self.model.config
        self.state: dict[str, Tensor] = self.model.state_dict()
        if is_tied(self.model):
            self.state.pop("lm_head.weight", None)
        self.codes: dict[str, StoredWeight] = {}
        quantization = quantization_at(name)
        if quantization is not None:
            layers, _ = split_tensors(read_tensors(Path(locate(name).path)), quantization)
            self.codes = {f"{layer}.weight": found.stored for layer, found in layers.items()}

    def block_type(self, name: str, gguf_type: str) -> str:
        """The type that a tensor gets: F32 for vectors, F16 where rows are no multiple of a block.

        Embedding and head stay at 8 bits in a 4-bit file.
        """
        tensor = self.state[name]
        if tensor.ndim == 1:
            return "f32"
        if gguf_type == "f16" or tensor.shape[1] % BLOCK:
            return "f16"
        is_outer = name.startswith(("model.embed_tokens", "lm_head"))
        return "q8_0" if is_outer else gguf_type

    def data(self, name: str, gguf_type: str) -> np.ndarray:
        """A tensor as stored in its type: uint8 rows of blocks, float16 or float32."""
        kind = self.block_type(name, gguf_type)
        largest = float(self.state[name].abs().max())
        if largest > _LARGEST[kind]:
            raise CompressionError(
                f"{name}: holds {largest:.4g}, beyond what {kind.upper()} holds ({_LARGEST[kind]:.4g}); no other "
                "type is written for it."
            )
        if name in self.codes and fits(self.codes[name], kind):
            return blocks_of(self.codes[name], kind)
        gguf = library()
        return gguf.quants.quantize(self.state[name].float().numpy(), gguf.GGMLQuantizationType[kind.upper()])

    def rounded(self, name: str, gguf_type: str) -> Tensor:
        """What the stored tensor stands for, float32."""
        gguf = library()
        kind = gguf.GGMLQuantizationType[self.block_type(name, gguf_type).upper()]
        return torch.from_numpy(np.array(gguf.quants.dequantize(self.data(name, gguf_type), kind), dtype=np.float32))


def fits(stored: StoredWeight, kind: str) -> bool:
    """Whether codes become blocks of a type without rounding."""
    bits = {"q8_0": 8, "q4_0": 4}.get(kind)
    group = stored.codes.shape[1] // stored.scales.shape[1]
    scales = stored.scales.float()
    is_exact = bool(torch.isclose(scales.half().float(), scales, rtol=2**-10, atol=0.0).all())
    return is_exact and stored.scheme.kind == "int" and stored.scheme.bits <= (bits or 0) and group % BLOCK == 0


def blocks_of(stored: StoredWeight, kind: str) -> np.ndarray:
    """Blocks of 32 codes behind their float16 scale, uint8 [O I / 32 * (2 + 32 or 16)].

    Q8_0 holds the codes as bytes. Q4_0 holds code + 8, of elements j and j + 16 in one byte, the first one low.
    """
    outputs, inputs = stored.codes.shape
    scales = stored.scales.float().repeat_interleave(inputs // BLOCK // stored.scales.shape[1], dim=1)
    head = scales.to(torch.float16).numpy().view(np.uint8).reshape(outputs, -1, 2)
    codes = stored.codes.numpy().reshape(outputs, -1, BLOCK)
    body: np.ndarray = codes.view(np.uint8)
    if kind == "q4_0":
        unsigned = (codes + 8).astype(np.uint8)
        body = unsigned[..., : BLOCK // 2] | unsigned[..., BLOCK // 2 :] << 4
    return np.concatenate([head, body], axis=-1).reshape(outputs, -1)
