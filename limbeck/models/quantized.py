"""Reading quantised checkpoints (compressed-tensors) as dense models that compute what an engine would.

Weights are made dense in the dtype that is asked for. Where the inputs of a linear layer are quantised too, the layer
is a `RoundedLinear`, which rounds them as the format says: the model is then an exact reference for quality, and as
slow as the dense one. Needs nothing but torch and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from limbeck.errors import ModelError
from limbeck.models.kv_quant import FP8_LARGEST, Rounding, attention_layers, round_cache
from limbeck.models.schemes import KV_CACHE_SCHEME, STATUS, SUFFIXES, Scheme, StoredWeight, stored_weight, weight_of
from limbeck.models.weight_files import tensor_files

FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mixed-precision",
)  # fmt: skip


class Quantization(NamedTuple):
    """What a `quantization_config` says."""

    schemes: dict[str, Scheme]
    """By target: a module name, `re:` and a pattern, or `Linear`."""
    ignore: tuple[str, ...]
    """Targets that stay dense."""
    kv_cache: bool

    def scheme(self, name: str) -> Scheme | None:
        """The scheme of a linear layer; a name goes before a pattern and a pattern before the class."""
        if any(_matches(target, name) for target in self.ignore):
            return None
        matching = [target for target in self.schemes if _matches(target, name)]
        matching.sort(key=lambda target: (target == "Linear", target.startswith("re:")))
        return self.schemes[matching[0]] if matching else None


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (name, "Linear")


def quantization_of(config: Mapping[str, Any], where: str) -> Quantization | None:
    """Read the quantisation of a config.json; None for a dense model.

    Args:
      config: the file's content.
      where: its name, for messages.
    Raises: ModelError for what is not read here, and for what some engine is known to read wrongly.
    """
    tree = config.get("quantization_config")
    if tree is None:
        return None
    _check_tree(tree, where)
    schemes: dict[str, Scheme] = {}
    for name, group in (tree.get("config_groups") or {}).items():
        scheme = _read_scheme(group, f"{where}, {name}")
        if (group.get("format") or tree["format"]) not in (scheme.format, "mixed-precision"):
            raise ModelError(f"{where}, {name}: its scheme is stored as {scheme.format}, not {group.get('format')}.")
        schemes.update(dict.fromkeys(group["targets"], scheme))
    return Quantization(schemes, tuple(tree.get("ignore") or ()), bool(tree.get("kv_cache_scheme")))


def _check_tree(tree: Mapping[str, Any], where: str) -> None:
    method = tree.get("quant_method")
    if method != "compressed-tensors":
        raise ModelError(f"{where}: quantised with {method!r}; compressed-tensors is read. Make it dense first.")
    if tree.get("quantization_status") != STATUS:
        raise ModelError(
            f"{where}: quantization_status is {tree.get('quantization_status')!r}. Without {STATUS!r} transformers "
            "loads the file and computes with wrong weights; write the status into config.json if its tensors are "
            "quantised."
        )
    for key in ("sparsity_config", "transform_config"):
        if tree.get(key):
            raise ModelError(f"{where}: {key} is set; engines have dropped it. Export the weights dense, without it.")
    if tree.get("format") not in FORMATS:
        raise ModelError(f"{where}: format {tree.get('format')!r} is unknown; read are {', '.join(FORMATS)}.")
    kv_cache = tree.get("kv_cache_scheme")
    if kv_cache and any(kv_cache.get(key) != value for key, value in KV_CACHE_SCHEME.items()):
        raise ModelError(f"{where}: kv_cache_scheme {kv_cache} is not read; {KV_CACHE_SCHEME} is.")


def _read_scheme(group: Mapping[str, Any], where: str) -> Scheme:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if not weights.get("symmetric", True):
        raise ModelError(f"{where}: asymmetric weights, which transformers does not load; quantise symmetrically.")
    if weights.get("actorder") == "group":
        raise ModelError(f"{where}: actorder group, which is being removed; quantise with static groups.")
    if not (_is_read(weights) and _are_inputs_read(weights, inputs)) or group.get("output_activations"):
        raise ModelError(
            f"{where}: weights {weights} with input_activations {inputs} are not read; known are 2 to 8 bit groups, "
            "int8 with dynamic int8 inputs, E4M3 with dynamic or static inputs, NVFP4 and MXFP4 of weights alone."
        )
    is_grouped = weights["strategy"] in ("group", "tensor_group")
    return Scheme(
        bits=int(weights["num_bits"]),
        kind=weights["type"],
        strategy=weights["strategy"],
        group_size=weights["group_size"] if is_grouped else None,
        activations=_activations(inputs) if inputs else None,
    )


def _is_read(weights: Mapping[str, Any]) -> bool:
    kind, bits, strategy = weights.get("type"), int(weights.get("num_bits") or 0), weights.get("strategy")
    if kind == "float" and bits == 4:
        return (strategy, weights.get("group_size")) in (("tensor_group", 16), ("group", 32))
    is_type_read = bits in range(2, 9) if kind == "int" else kind == "float" and bits == 8
    return is_type_read and (strategy in ("channel", "tensor") or (strategy == "group" and bool(weights["group_size"])))


def _are_inputs_read(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> bool:
    if not inputs:
        return True
    strategy = "token" if _activations(inputs) == "dynamic" else "tensor"
    expected = {"num_bits": 8, "type": weights.get("type"), "strategy": strategy}
    is_plain = inputs.get("symmetric", True) and weights.get("strategy") != "group"
    return bool(is_plain) and all(inputs.get(key) == value for key, value in expected.items())


def _activations(inputs: Mapping[str, Any]) -> str:
    return "dynamic" if inputs.get("dynamic") is True else "static"


def load_quantized(
    directory: Path, quantization: Quantization, dtype: torch.dtype, attention: str, rounds: bool = True
) -> tuple[Any, dict[str, Any]]:
    """Build the dense model of a quantised directory, its inputs rounded where the scheme says so.

    Args:
      directory: with config.json and safetensors files.
      quantization: what the config says.
      dtype: of the dense weights.
      attention: transformers' name of the attention implementation.
      rounds: False leaves inputs, keys and values as they are: the dense weights alone.
    Returns: the model and transformers' loading info.
    Raises: ModelError when weights and config contradict each other.
    """
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    del config.quantization_config
    layers, weights = split_tensors(read_tensors(directory), quantization)
    scales = {name: weights.pop(name) for name in list(weights) if name.endswith(("k_scale", "v_scale"))}
    weights |= {f"{name}.weight": weight_of(layer.stored, dtype) for name, layer in layers.items()}
    kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
    )
    _round_inputs(model, layers, quantization, rounds, directory)
    if quantization.kv_cache and rounds:
        round_cache(model, _fixed_rounding(model, scales, dtype, directory))
    elif scales and not quantization.kv_cache:
        raise ModelError(f"{directory}: holds {next(iter(scales))}, but config.json has no kv_cache_scheme.")
    return model, info


def _round_inputs(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], quantization: Quantization, rounds: bool, directory: Path
) -> None:
    """Let the layers round what they read, where their scheme says so and `rounds` does."""
    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]:
        scheme = quantization.scheme(name)
        if scheme is not None and name not in layers:
            raise ModelError(f"{directory}: {name} is stored dense, but config.json says it is quantised.")
        if rounds and scheme is not None and scheme.activations is not None:
            model.set_submodule(name, RoundedLinear(module, scheme, layers[name].input_scale))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's model, as they are stored.

    Raises: ModelError for a file that cannot be read.
    """
    files = tensor_files(directory)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name, place in files.items() if place == file}
    return tensors


class QuantizedLayer(NamedTuple):
    """A quantised linear layer of a file."""

    stored: StoredWeight
    input_scale: Tensor | None
    """[1], of static activations."""


def split_tensors(
    stored: Mapping[str, Tensor], quantization: Quantization
) -> tuple[dict[str, QuantizedLayer], dict[str, Tensor]]:
    """Quantised layers by module name, and all other tensors by their own.

    Raises: ModelError when a tensor has no place in its layer's scheme.
    """
    names = [name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]
    layers = {name: _read_layer(name, stored, quantization.scheme(name)) for name in names}
    others: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        layer, _, suffix = name.rpartition(".")
        if layer in layers and suffix in SUFFIXES:
            continue
        if suffix.startswith(("weight_", "input_")):
            raise ModelError(f"{name}: such a tensor is not read; the checkpoint has an unsupported scheme.")
        others[name] = tensor
    return layers, others


def _read_layer(layer: str, stored: Mapping[str, Tensor], scheme: Scheme | None) -> QuantizedLayer:
    if scheme is None:
        raise ModelError(f"{layer}: has a weight_scale, but no group of config.json is meant for it.")
    if layer.endswith("lm_head") and scheme.activations is not None:
        raise ModelError(f"{layer}: a head whose inputs are quantised is not supported; leave it dense.")
    own = {suffix: stored[f"{layer}.{suffix}"] for suffix in SUFFIXES if f"{layer}.{suffix}" in stored}
    if scheme.activations == "static" and "input_scale" not in own:
        raise ModelError(f"{layer}: static activations without an input_scale; the file is damaged.")
    return QuantizedLayer(stored_weight(own, scheme, layer), own.get("input_scale"))


def _fixed_rounding(model: nn.Module, scales: Mapping[str, Tensor], dtype: torch.dtype, directory: Path) -> Rounding:
    for layer in attention_layers(model):
        for name in (f"{layer}.k_scale", f"{layer}.v_scale"):
            if name not in scales:
                raise ModelError(f"{directory}: no {name}, which a kv_cache_scheme needs; the file is damaged.")

    def rounded(layer: str, kind: str, states: Tensor) -> Tensor:
        return _on_grid(states, scales[f"{layer}.{kind}_scale"].to(dtype), "float")

    return rounded


class RoundedLinear(nn.Linear):
    """A linear layer whose inputs are rounded to 8 bits first; gradients pass through the rounding.

    Of a class of its own, so that fast paths which read the weights of plain linear layers leave it alone.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme, input_scale: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.kind = scheme.kind
        # No buffer: saved weights have to be those of the dense model.
        self.input_scale = None if scheme.activations == "dynamic" else input_scale

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(_Rounded.apply(inputs, self.kind, self.input_scale), self.weight, self.bias)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, kind: str, scale: Tensor | None) -> Tensor:
        return rounded_inputs(inputs, kind, scale)

    @staticmethod
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor, None, None]:
        return by_output, None, None


def rounded_inputs(inputs: Tensor, kind: str, scale: Tensor | None) -> Tensor:
    """Inputs [... I] rounded to 8 bits and back, in their own dtype.

    Args:
      kind: int (a range of 255 steps, as compressed-tensors has it; engines divide by 127) or float (E4M3).
      scale: fixed [1]; None takes each token's largest magnitude.
    """
    if not inputs.numel():
        return inputs
    if scale is None:
        steps = 127.5 if kind == "int" else FP8_LARGEST
        scale = inputs.abs().amax(-1, keepdim=True) / steps
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return _on_grid(inputs, scale.to(inputs.dtype), kind)


def _on_grid(values: Tensor, scale: Tensor, kind: str) -> Tensor:
    units = values / scale
    if kind == "int":
        return units.clamp(-128, 127).round() * scale
    return units.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).to(values.dtype) * scale
