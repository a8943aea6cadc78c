"""What a model of a shape costs: its parameters, their bytes, or the measured time of a prompt."""

from __future__ import annotations

import json
import re
import statistics
import time
from typing import Any, Literal, NamedTuple

import torch
import transformers

from limbeck.compress.shrink import shrunk_config

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_BLOCK = re.compile(r"layers\.\d+\.")


class Shape(NamedTuple):
    """The sizes of a model that is uniform over its layers."""

    neurons: int
    """F."""
    kv_groups: int
    """KV groups of a layer, each with its query heads."""
    layers: tuple[int, ...]
    """The layers of the whole model that are left, sorted."""


def whole_shape(config: Any) -> Shape:
    """The shape of the model that a config describes."""
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Shape(config.intermediate_size, groups, tuple(range(config.num_hidden_layers)))


class ShapeCost:
    """Cost of shapes of one model; each is measured once."""

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        metric: Literal["parameters", "bytes", "milliseconds"],
        prompt_tokens: int = 512,
        repeats: int = 5,
    ) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self._metric, self._prompt_tokens, self._repeats = metric, prompt_tokens, repeats
        self._known: dict[tuple[int, int, int], float] = {}

    def __call__(self, shape: Shape) -> float:
        """In units of the metric; which layers are left does not matter, only how many."""
        key = (shape.neurons, shape.kv_groups, len(shape.layers))
        if key not in self._known:
            self._known[key] = self._measure(shape)
        return self._known[key]

    def _measure(self, shape: Shape) -> float:
        config = shrunk_config(self._config, neurons=shape.neurons, kv_groups=shape.kv_groups, layers=shape.layers)
        if self._metric == "milliseconds":
            return prompt_milliseconds(config, self._dtype, self._device, self._prompt_tokens, self._repeats)
        return file_bytes(config, self._dtype) if self._metric == "bytes" else parameters_of(config)


def parameters_of(config: Any) -> int:
    """Parameters of a causal LM with that config, shared ones once."""
    return sum(parameter.numel() for parameter in _skeleton(config).parameters())


def file_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of a model's safetensors files: the weights, and a header for the shard of each block and of the rest."""
    shards: dict[str, list[tuple[str, Any]]] = {}
    for name, parameter in _skeleton(config).named_parameters():
        block = found[0] if (found := _BLOCK.search(name)) else ""
        shards.setdefault(block, []).append((name, parameter))
    return sum(_shard_bytes(parameters, dtype) for parameters in shards.values())


def _shard_bytes(parameters: list[tuple[str, Any]], dtype: torch.dtype) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    # safetensors lays tensors of one dtype out by name, and the header has their places in decimal digits.
    for name, parameter in sorted(parameters, key=lambda pair: pair[0]):
        end = size + parameter.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(parameter.shape), "data_offsets": [size, end]}
        size = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + size


def _skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def prompt_milliseconds(
    config: Any, dtype: torch.dtype, device: torch.device, prompt_tokens: int, repeats: int
) -> float:
    """Median time from a prompt to the logits of its next token, with random weights of that shape.

    Args:
      config: of the model.
      dtype, device: as it will run.
      prompt_tokens: T of the one sequence.
      repeats: timed passes, after one that is not.
    """
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval().to(device)
    ids = torch.arange(prompt_tokens, device=device)[None] % config.vocab_size
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:])
