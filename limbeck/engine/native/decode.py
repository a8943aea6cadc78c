"""What `decode.cpp` takes: weights and rows as its structures, and its two functions on tensors."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.engine.decoder import Decoder
from limbeck.engine.int8 import Int8Linear
from limbeck.engine.native.build import Missing, library
from limbeck.engine.states import Segment
from limbeck.engine.weights import DenseLinear, LayerWeights, Linear, SideBySide, Weights

ACTIVATIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1, "PytorchGELUTanh": 1}
"""Of transformers, by their class; the value is `is_gelu`."""


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_Linear = _structure(
    "Linear",
    **dict.fromkeys(("weight", "scales", "zeros", "bias"), ctypes.c_void_p),
    **dict.fromkeys(("outputs", "inputs"), ctypes.c_int32),
)
NORMS = ("attention_norm", "query_norm", "key_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")
_Layer = _structure(
    "Layer",
    **dict.fromkeys(NORMS, ctypes.c_void_p),
    **dict.fromkeys(("query", "key", "value", "output", "gate", "up", "down"), _Linear),
    **dict.fromkeys(("cosines", "sines"), ctypes.c_void_p),
    scale=ctypes.c_float,
    window=ctypes.c_int32,
)
_Model = _structure(
    "Model",
    layers=ctypes.c_void_p,
    norm=ctypes.c_void_p,
    epsilon=ctypes.c_float,
    **dict.fromkeys(("depth", "size", "heads", "key_heads", "head_size", "inner", "is_gelu"), ctypes.c_int32),
)


class _Keeper:
    """Tensors that structures point into."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def at(self, tensor: Tensor | None) -> int | None:
        """Address of a float32 tensor."""
        if tensor is None:
            return None
        self.tensors.append(tensor.float().contiguous())
        return self.tensors[-1].data_ptr()

    def parts(self, linear: Linear, sizes: Sequence[int]) -> list[Any]:
        """Outputs of a layer that are read apart."""
        if isinstance(linear, SideBySide):
            return [self.linear(part) for part in linear.parts]
        ends = list(itertools.accumulate(sizes))
        return [self.linear(linear, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]

    def linear(self, linear: Linear, rows: slice = slice(None)) -> Any:
        """Some outputs of a layer. Raises: Missing for one of another kind."""
        if isinstance(linear, DenseLinear):
            weight = linear.weight[rows]
            bias = None if linear.bias is None else linear.bias[rows]
            return _Linear(self.at(weight), None, None, self.at(bias), *weight.shape)
        if not isinstance(linear, Int8Linear):
            raise Missing("some layers are neither float32 nor int8")
        codes, scales = (part[rows] for part in linear.unpacked())
        bias = None if linear.bias is None else linear.bias[rows]
        outputs, inputs = codes.shape
        block = library().limbeck_block()
        padded = torch.nn.functional.pad(codes, (0, -inputs % 4, 0, -outputs % block))
        packed = padded.unflatten(0, (-1, block)).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()
        zeros = (128 * padded.float().sum(1)).to(torch.int32)  # whole numbers below 2^24, which float32 holds
        self.tensors += [packed, zeros]
        scales = torch.nn.functional.pad(scales, (0, -outputs % block))
        return _Linear(packed.data_ptr(), self.at(scales), zeros.data_ptr(), self.at(bias), outputs, inputs)


class NativeDecoder:
    """All layers of a model for single tokens. int8 codes are held a second time, in the order they are read in."""

    def __init__(self, decoder: Decoder) -> None:
        """Raises: Missing where there is no library, or the model has parts that it does not know."""
        self._library, self._keeper = library(), _Keeper()
        weights = decoder.weights
        if decoder.device.type != "cpu" or decoder.dtype != torch.float32:
            raise Missing(f"the weights are {decoder.dtype} on {decoder.device}; the kernels take float32 on a CPU")
        activation = type(weights.activation).__name__
        if activation not in ACTIVATIONS:
            raise Missing(f"the activation {activation} is not known to the kernels")
        sizes = [decoder.head_size * count for count in (decoder.heads, decoder.key_heads, decoder.key_heads)]
        layers = [_layer(self._keeper, block, weights, sizes) for block in weights.blocks]
        self._embed = weights.embed
        self._layers = (_Layer * len(layers))(*layers)
        self._model = _Model(
            ctypes.addressof(self._layers),
            self._keeper.at(weights.norm),
            decoder.epsilon,
            len(layers),
            len(weights.norm),
            decoder.heads,
            decoder.key_heads,
            decoder.head_size,
            layers[0].gate.outputs,
            ACTIVATIONS[activation],
        )

    def step(self, segments: Sequence[Segment]) -> Tensor:
        """States [n D] behind the final norm of segments of one token; their keys and values are kept."""
        x = self._embed(torch.tensor([segment.tokens[0] for segment in segments]))
        states = x.clone(memory_format=torch.contiguous_format)
        # As `Row` of decode.cpp: eight numbers of eight bytes.
        rows = np.array([(*s.prefix.place, s.start) for s in segments], dtype=np.int64)
        pointers = ctypes.c_void_p(rows.ctypes.data), len(rows), ctypes.c_void_p(states.data_ptr())
        self._library.limbeck_step(ctypes.byref(self._model), *pointers, torch.get_num_threads())
        return states


class NativeLinear:
    """A layer [U I] -> [U O] whose rows do not depend on each other, in float32 too."""

    def __init__(self, linear: Linear) -> None:
        """Raises: Missing."""
        self._library, self._keeper = library(), _Keeper()
        self._linear = self._keeper.linear(linear)

    def __call__(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self._linear.outputs)
        x = x.contiguous()
        pointers = ctypes.c_void_p(x.data_ptr()), len(x), ctypes.c_void_p(y.data_ptr())
        self._library.limbeck_product(ctypes.byref(self._linear), *pointers, torch.get_num_threads())
        return y


def _layer(keeper: _Keeper, block: LayerWeights, weights: Weights, sizes: Sequence[int]) -> Any:
    cosines, sines = weights.ropes[block.rope]
    return _Layer(
        *(keeper.at(getattr(block, name)) for name in NORMS),
        *keeper.parts(block.qkv, sizes),
        keeper.linear(block.output),
        *keeper.parts(block.gate_up, [block.inner] * 2),
        keeper.linear(block.down),
        keeper.at(cosines),
        keeper.at(sines),
        block.scale,
        block.window or 0,
    )
