"""A small random model that keeps what a config says of layers, windows, chunks, caps, sinks, experts and rope.

Whether a way of running a model is right depends on its architecture, not on its weights or widths; so it is tried on
a model of a few hundred thousand weights whose thresholds are low enough for two short sequences to cross all of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from limbeck.errors import ModelError
from limbeck.models.parts import text_config

MAX_LAYERS = 8
VOCABULARY = 64
MAX_WEIGHTS = 100_000_000
_THRESHOLDS = {
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "window_size", "local_attention"), 16),
    "original_max_position_embeddings": 32,
    "index_topk": 16,
}
"""Tokens after which something changes, made so few; a smaller number stays."""
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
_ROOM = 256
"""Positions that a table of them has at least."""
_EXPERTS = re.compile(r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_experts_per_layer")
_WIDTHS = re.compile(
    r"(moe_|shared_|shared_expert_|mlp_|dense_)*(intermediate_size|ffn_hidden_size|ffn_dim)(_mlp)?|n_inner"
)
_PERIODS = re.compile(r".*(period|interval|pattern|_step|first_k_dense|every_n|num_dense_layers|offset).*")
_NAMED_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_TOKENS = re.compile(r".*(token_id|token_index|_token_ids|_index)$")


def miniatures(kind: type[Any], config: Any, seed: int = 0) -> list[Callable[[], Any]]:
    """Makers of random float32 models of class `kind` in evaluation mode, the smallest first; each may raise anything.

    Args:
      kind: class of the model, such as LlamaForCausalLM.
      config: its config, of any size; stays as it is.
    """
    return [partial(_build, kind, config, narrow, seed) for narrow in (True, False)]


def small_config(config: Any, narrow: bool = True) -> Any:
    """The config with few layers, experts and tokens and low thresholds; `narrow` also takes heads and widths."""
    small = copy.deepcopy(config)
    for part in _parts(small):
        _set(part, _fewer(part))
    text = text_config(small)
    values = _own_values(text)
    _set(text, _first_layers(values, _layers_kept(values)))
    tables = [name for name in ("vocab_size", "vocab_size_per_layer_input") if name in values]
    _set(text, _low_thresholds(values) | dict.fromkeys(tables, VOCABULARY))
    if narrow:
        _set(text, _narrow(_own_values(text)))
    for part in {id(small): small, id(text): text}.values():
        _set(part, {k: _token(v) for k, v in _own_values(part).items() if _TOKENS.match(k)})
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return small


def _parts(config: Any) -> list[Any]:
    """The configs of what is no text (towers, projectors)."""
    text = text_config(config)
    return [
        part for name in config.sub_configs if (part := getattr(config, name, None)) is not None and part is not text
    ]


def _fewer(part: Any) -> dict[str, Any]:
    return {name: 1 for name in (*_NAMED_LAYERS, "depth") if isinstance(getattr(part, name, None), int)}


def _own_values(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in config.sub_configs}


def _set(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _token(value: Any) -> Any:
    """An id of the small vocabulary."""
    if isinstance(value, list):
        return [_token(v) for v in value]
    return value % VOCABULARY if isinstance(value, int) and not isinstance(value, bool) else value


def _num_layers(values: Mapping[str, Any]) -> int | None:
    return next((values[name] for name in _NAMED_LAYERS if values.get(name)), None)


def _lists_of_layers(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Fields with an entry a layer."""
    total = _num_layers(values)
    return {name: value for name, value in values.items() if isinstance(value, list) and len(value) == total}


def _first_layers(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    numbers: dict[str, Any] = {name: count for name in _NAMED_LAYERS if name in values}
    return numbers | {name: value[:count] for name, value in _lists_of_layers(values).items()}


def _layers_kept(values: Mapping[str, Any]) -> int:
    """The first layers, as many as have every kind of layer among them, at most all."""
    total = _num_layers(values) or 1
    if values.get("num_kv_shared_layers"):
        return total  # the last layers take keys from the ones before them: which ones is a matter of all
    lists = _lists_of_layers(values).values()
    # A list of layers by number says nothing of their kinds.
    kinds = [value for value in lists if not (isinstance(value[0], int) and len(set(value)) == total > 2)]
    rows = [repr(row) for row in zip(*kinds, strict=True)]
    first_of_each = [rows.index(row) for row in set(rows)]
    return min(total, 1 + max([1, *first_of_each, *_periods(values)]))


def _periods(values: Mapping[str, Any]) -> list[int]:
    """After how many layers one of another kind comes."""
    found = [value for name, value in values.items() if _PERIODS.match(name) and isinstance(value, int)]
    return [period for period in found if period < 2 * MAX_LAYERS]


def _low_thresholds(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: min(limit, values[name]) for name, limit in _THRESHOLDS.items() if isinstance(values.get(name), int)
    }
    found |= {name: max(_ROOM, values[name]) for name in _POSITIONS if isinstance(values.get(name), int)}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(name), dict):
            found[name] = _low_rope(values[name])
    return found


def _low_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The same of rope parameters, which may be one set a kind of layer."""
    low = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            low[name] = _low_rope(value)
        else:
            low[name] = min(value, _THRESHOLDS[name]) if name in _THRESHOLDS and value is not None else value
    return low


def _narrow(values: Mapping[str, Any]) -> dict[str, Any]:
    """Few heads of the size they have, their ratio to key heads kept, few experts, narrow feed-forward layers."""
    return {**_narrow_widths(values), **_few_experts(values), **_few_linear_heads(values), **_few_heads(values)}


def _narrow_widths(values: Mapping[str, Any]) -> dict[str, Any]:
    widths = {name: value for name, value in values.items() if _WIDTHS.fullmatch(name)}
    found: dict[str, Any] = {name: 32 for name, value in widths.items() if isinstance(value, int)}
    return found | {name: [32] * len(value) for name, value in widths.items() if isinstance(value, list)}


def _few_experts(values: Mapping[str, Any]) -> dict[str, int]:
    """As many as a token takes and 4 at least, the same number in every group."""
    top = max([values.get(name) or 0 for name in ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")])
    groups = values.get("n_group") or 1
    most = groups * max(2, -(-max(4, top) // groups))
    counts = {name: value for name, value in values.items() if _EXPERTS.fullmatch(name) and isinstance(value, int)}
    return {name: min(count, most) for name, count in counts.items()}


def _few_linear_heads(values: Mapping[str, Any]) -> dict[str, int]:
    keys, queries = values.get("linear_num_key_heads"), values.get("linear_num_value_heads")
    if not isinstance(keys, int) or not isinstance(queries, int) or keys <= 2:
        return {}
    return {"linear_num_key_heads": 2, "linear_num_value_heads": 2 * queries // keys}


def _few_heads(values: Mapping[str, Any]) -> dict[str, int]:
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 4:
        return {}
    head_dim = values.get("head_dim") or hidden // heads
    few = 4 if head_dim <= 128 else 2
    found = {"num_attention_heads": few, "hidden_size": few * head_dim}
    keys = values.get("num_key_value_heads")
    if isinstance(keys, int):
        found["num_key_value_heads"] = {heads: few, 1: 1}.get(keys, few // 2)
    return found | _sizes_of(values, few, few * head_dim)


def _sizes_of(values: Mapping[str, Any], heads: int, hidden: int) -> dict[str, int]:
    """Sizes that other parts have by the number of heads and the width of the model."""
    found = {}
    for number, size in (("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim")):
        if values.get(number) and values.get(size) and values.get("mamba_expand"):
            found[size] = values["mamba_expand"] * hidden // values[number]
    if values.get("attention_hidden_size") and values.get("attention_head_dim"):
        found["attention_hidden_size"] = heads * values["attention_head_dim"]
    return found


def _build(kind: type[Any], config: Any, narrow: bool, seed: int) -> Any:
    config = small_config(config, narrow)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind._from_config(copy.deepcopy(config)).parameters())
    if size > MAX_WEIGHTS:
        raise ModelError(f"{kind.__name__}: {size} weights are too many to try a layout with.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind._from_config(config, dtype=torch.float32).eval()
        randomize(model)
    return model


@torch.no_grad()
def randomize(model: Any) -> None:
    """Move every weight, so that attention is sharp, norms are not one and biases and sinks not zero."""
    for parameter in model.parameters():
        spread = 0.1 if parameter.ndim < 2 else 1.5 * parameter.shape[-1] ** -0.5
        parameter.add_(torch.randn_like(parameter) * spread)
    model.tie_weights()
