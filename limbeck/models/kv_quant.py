"""Keys and values in 8 bits: a cache that stores int8, rounding by hooks, and the fixed scales that an export needs.

`int8_cache()` really stores 8 bits, one scale a token and head, and goes wherever transformers takes a cache.
`round_cache` rounds what enters attention without any cache, so that whole sequences can be scored; with
`int8_rounding` both give the same numbers. Engines take E4M3 with one fixed scale a layer (`kv_cache_scheme`):
`cache_scales` finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, DynamicLayer

from limbeck.errors import ModelError

_SCALE_BYTES = 4
FP8_LARGEST = 448.0

Rounding = Callable[[str, str, Tensor], Tensor]
"""(attention layer's name, "k" or "v", states [B N_kv T H]) -> states, rounded."""


class Int8(NamedTuple):
    """States in 8 bits."""

    codes: Tensor
    """int8 [B N_kv T H], -127..127."""
    scales: Tensor
    """float32 [B N_kv T 1], the largest magnitude of a token and head over 127."""

    @classmethod
    def of(cls, states: Tensor) -> Int8:
        """Round states [B N_kv T H]."""
        scales = states.float().abs().amax(-1, keepdim=True) / 127
        codes = (states.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        return cls(codes, scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """States [B N_kv T H]; each is off by at most half its scale."""
        return (self.codes.float() * self.scales).to(dtype)


class Int8Layer(DynamicLayer):
    """The cache of one layer as int8 [B N_kv T H + 4]: codes, and behind them the four bytes of their scale.

    With both in one tensor, everything that reorders, repeats or crops a cache works as it does on plain states.
    """

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns all states so far, dequantised."""
        new_keys, new_values = _to_bytes(Int8.of(key_states)), _to_bytes(Int8.of(value_states))
        if self.is_initialized:
            new_keys, new_values = torch.cat([self.keys, new_keys], -2), torch.cat([self.values, new_values], -2)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys: Tensor = new_keys
        self.values: Tensor = new_values
        return _from_bytes(new_keys).dequantize(key_states.dtype), _from_bytes(new_values).dequantize(key_states.dtype)


def int8_cache() -> Cache:
    """An empty cache for any number of attention layers, 1 + 4 / H bytes an element."""
    return Cache(layer_class_to_replicate=Int8Layer)


def _to_bytes(states: Int8) -> Tensor:
    return torch.cat([states.codes, states.scales.view(torch.int8)], dim=-1)


def _from_bytes(stored: Tensor) -> Int8:
    codes, scales = stored.split([stored.shape[-1] - _SCALE_BYTES, _SCALE_BYTES], dim=-1)
    return Int8(codes, scales.contiguous().view(torch.float32))


def int8_rounding(layer: str, kind: str, states: Tensor) -> Tensor:
    """The rounding of `int8_cache`."""
    return Int8.of(states).dequantize(states.dtype)


def round_cache(model: nn.Module, rounding: Rounding) -> list[RemovableHandle]:
    """Round the keys (after their rotation) and values of every attention layer, from now on.

    Args:
      model: a causal LM whose attention takes `past_key_values`.
      rounding: what is done to them.
    Returns: handles whose `remove` ends it.
    Raises: ModelError when the model has no such attention.
    """
    return [
        module.register_forward_pre_hook(_Swap(name, rounding), with_kwargs=True)
        for name, module in attention_layers(model).items()
    ]


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a model by name.

    Raises: ModelError when it has none with `k_proj` and `v_proj`.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "k_proj") and hasattr(module, "v_proj")
    }
    if not found:
        raise ModelError(f"{type(model).__name__}: no attention layer with k_proj and v_proj to round the cache of.")
    return found


@contextmanager
def rounded_cache(model: nn.Module, rounding: Rounding = int8_rounding) -> Iterator[None]:
    """`round_cache` for the length of a block."""
    handles = round_cache(model, rounding)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def cache_scales(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Fixed E4M3 scales of keys and values: the largest magnitude seen over 448.

    Args:
      model: a causal LM.
      batches: int64 [B T] without padding.
    Returns: by tensor name, such as `model.layers.0.self_attn.k_scale`, float32 [1].
    """
    largest: dict[str, Tensor] = {}

    def watch(layer: str, kind: str, states: Tensor) -> Tensor:
        name = f"{layer}.{kind}_scale"
        seen = states.float().abs().amax().reshape(1)
        largest[name] = torch.maximum(largest[name], seen) if name in largest else seen
        return states

    with rounded_cache(model, watch):
        for input_ids in batches:
            model(input_ids=input_ids, use_cache=False)
    smallest = torch.finfo(torch.float32).eps
    return {name: (seen / FP8_LARGEST).clamp(min=smallest).cpu() for name, seen in largest.items()}


class _Swap:
    """The hook: gives an attention layer a cache that rounds before it hands over to the real one, if there is one."""

    def __init__(self, layer: str, rounding: Rounding) -> None:
        self._layer, self._rounding = layer, rounding

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache = _Rounding(self._layer, self._rounding, kwargs.get("past_key_values"))
        return args, {**kwargs, "past_key_values": cache}


class _Rounding:
    """Stands for a layer's cache; all but `update` is the real one's."""

    def __init__(self, layer: str, rounding: Rounding, real: Any) -> None:
        self._layer, self._rounding, self._real = layer, rounding, real

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = self._rounding(self._layer, "k", key_states)
        values = self._rounding(self._layer, "v", value_states)
        return (keys, values) if self._real is None else self._real.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
