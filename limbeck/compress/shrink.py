"""Smaller weights and a smaller config from the indices of what was kept.

Indices are recorded when a layer is solved; nothing is read off from zeros, so that a kept neuron whose weights are
zero stays, and the written model is the masked one with its dead parts left out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from limbeck.errors import CompressionError

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
_UNCHANGED = re.compile(r"(norm|layernorm|gate|router)\.(weight|bias)$|(^|\.)(o_proj|down_proj)\.bias$")
"""Tensors of a block that have no part for a neuron or a head."""


class BlockKept(NamedTuple):
    """What stays of one block; None leaves a part whole."""

    neurons: Tensor | None = None
    """int64 [F'], sorted; [E F'] where every expert keeps its own."""
    kv_groups: Tensor | None = None
    """int64 [K'], sorted; each with its query heads."""


class BlockSizes(NamedTuple):
    """The sizes of an attention that its weights do not tell."""

    head_dim: int
    query_heads: int
    """Query heads of a KV group."""

    @classmethod
    def of(cls, config: Any) -> BlockSizes:
        """The sizes by a model's config."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(head_dim, heads // (getattr(config, "num_key_value_heads", None) or heads))


def shrink_block(tensors: Mapping[str, Tensor], kept: BlockKept, sizes: BlockSizes) -> dict[str, Tensor]:
    """The tensors of a block without the neurons and KV groups that go.

    Args:
      tensors: a block's state dict, names relative to the block (`self_attn.q_proj.weight`, `mlp.down_proj.weight`).
      kept: the indices.
      sizes: of the attention.
    Raises: CompressionError for a tensor that it cannot place, and when the block lacks the part that is to shrink.
    """
    if kept == BlockKept():
        return dict(tensors)
    queries = keys = None
    if kept.kv_groups is not None:
        queries = _spread(kept.kv_groups, sizes.head_dim * sizes.query_heads)
        keys = _spread(kept.kv_groups, sizes.head_dim)
    shrunk = {name: _shrink(name, tensor, kept.neurons, queries, keys) for name, tensor in tensors.items()}
    for wanted, layer in ((kept.neurons, "down_proj"), (kept.kv_groups, "o_proj")):
        if wanted is not None and not any(f".{layer}" in name for name in tensors):
            raise CompressionError(f"this block has no {layer}, so its part cannot be made smaller.")
    return shrunk


def shrunk_config(
    config: Any, *, neurons: int | None = None, kv_groups: int | None = None, layers: Sequence[int] | None = None
) -> Any:
    """The config of a smaller model, head size written out.

    Args:
      config: of the whole model; not changed.
      neurons: F' of every layer.
      kv_groups: K' of every layer.
      layers: the layers that stay, in order.
    Raises: CompressionError when transformers refuses such a model; names the numbers of KV groups that it takes.
    """
    tree = config.to_dict()
    sizes = BlockSizes.of(config)
    tree["head_dim"] = sizes.head_dim
    if neurons is not None:
        if "moe_intermediate_size" in tree:
            raise CompressionError(f"{config.model_type}: experts and dense layers differ in size; not supported.")
        tree["intermediate_size"] = neurons
    if kv_groups is not None:
        tree["num_key_value_heads"] = kv_groups
        tree["num_attention_heads"] = kv_groups * sizes.query_heads
    if layers is not None:
        tree |= _of_layers(tree, layers)
    try:
        return type(config).from_dict(tree)
    except Exception as error:  # transformers wraps its checks in its own kinds
        raise _refusal(config, kv_groups, error) from error


def _of_layers(tree: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The fields of a config that have an entry a layer, and the number of layers, when only `layers` stay."""
    count = tree["num_hidden_layers"]
    lists = {k: v for k, v in tree.items() if "layer" in k and isinstance(v, list) and len(v) == count}
    own = {key: [value[layer] for layer in layers] for key, value in lists.items()}
    return own | {"num_hidden_layers": len(layers)}


def _refusal(config: Any, kv_groups: int | None, error: Exception) -> CompressionError:
    accepted = kv_group_choices(config)
    if kv_groups is None or kv_groups in accepted:
        return CompressionError(f"transformers refuses the smaller config ({' '.join(str(error).split())}).")
    return CompressionError(
        f"{kv_groups} KV groups: transformers wants the hidden size {config.hidden_size} to be a multiple of the "
        f"query heads; keep {', '.join(map(str, accepted))} of {config.num_key_value_heads}."
    )


def kv_group_choices(config: Any) -> list[int]:
    """Numbers of KV groups that transformers accepts for a model, ascending."""
    whole = BlockSizes.of(config)
    groups = config.num_attention_heads // whole.query_heads
    return [count for count in range(1, groups + 1) if _is_accepted(config, count, whole)]


def round_size(size: float, multiple_of: int, whole: int) -> int:
    """The multiple of `multiple_of` nearest to a wanted size, at least one multiple; `whole` where that is no more."""
    return min(max(round(size / multiple_of), 1) * multiple_of, whole)


def renumbered(name: str, layers: Sequence[int]) -> str | None:
    """A tensor's name when only `layers` stay; None when it goes with its layer."""
    found = _LAYER.search(name)
    if found is None:
        return name
    number = int(found[0])
    return _LAYER.sub(str(list(layers).index(number)), name, count=1) if number in layers else None


def shrink_model(model: Any, blocks: Mapping[int, BlockKept], layers: Sequence[int] | None = None) -> Any:
    """A smaller copy of a model in memory, uniform over layers.

    Args:
      model: a transformers causal LM of `model.layers.<n>` blocks.
      blocks: what stays of each block; those not named stay whole.
      layers: the layers that stay; all when None.
    Raises: CompressionError when the blocks would differ in size, or as `shrunk_config`.
    """
    layers = range(model.config.num_hidden_layers) if layers is None else layers
    config = shrunk_config(
        model.config,
        neurons=_common("neurons", [blocks.get(layer, BlockKept()).neurons for layer in layers]),
        kv_groups=_common("kv_groups", [blocks.get(layer, BlockKept()).kv_groups for layer in layers]),
        layers=layers,
    )
    sizes, state = BlockSizes.of(model.config), model.state_dict()
    for layer, kept in blocks.items():
        prefix = f"model.layers.{layer}."
        block = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        state |= {prefix + name: tensor for name, tensor in shrink_block(block, kept, sizes).items()}
    with torch.random.fork_rng(devices=[]):
        smaller = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    smaller.load_state_dict({new: tensor for name, tensor in state.items() if (new := renumbered(name, layers))})
    smaller.tie_weights()
    return smaller.train(model.training).to(model.device)


def _shrink(name: str, tensor: Tensor, neurons: Tensor | None, queries: Tensor | None, keys: Tensor | None) -> Tensor:
    """One tensor of a block. Outputs of a linear layer are the last axis of a bias and the last but one of a weight."""
    layer = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    outputs = -1 if name.endswith(".bias") else -2
    if layer == "gate_up_proj" and neurons is not None:
        half = tensor.shape[outputs] // 2
        return _take(tensor, torch.cat([neurons, neurons + half], -1), outputs)
    places = {
        "gate_proj": (neurons, outputs),
        "up_proj": (neurons, outputs),
        "gate_up_proj": (neurons, outputs),
        "down_proj": (neurons, -1),
        "q_proj": (queries, outputs),
        "k_proj": (keys, outputs),
        "v_proj": (keys, outputs),
        "o_proj": (queries, -1),
    }
    if _UNCHANGED.search(name):
        return tensor
    if layer not in places:
        raise CompressionError(
            f"{name}: no rule for making this tensor smaller; supported are blocks with q, k, v, o, gate, up and down "
            "projections, and experts fused into gate_up_proj and down_proj."
        )
    index, axis = places[layer]
    return tensor if index is None else _take(tensor, index, axis)


def _take(tensor: Tensor, index: Tensor, axis: int) -> Tensor:
    """Entries along an axis; with an index [E n] other ones for each expert of a tensor [E ...]."""
    index = index.to(tensor.device)
    if index.ndim == 1:
        return tensor.index_select(axis, index)
    return torch.stack([expert.index_select(axis, own) for expert, own in zip(tensor, index, strict=True)])


def _spread(groups: Tensor, size: int) -> Tensor:
    """Indices of all entries of some groups of consecutive ones."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _common(what: str, kept: Sequence[Tensor | None]) -> int | None:
    sizes = {None if indices is None else indices.shape[-1] for indices in kept}
    if len(sizes) > 1:
        raise CompressionError(f"{what}: layers keep different numbers ({sizes}); stock model code needs one number.")
    return sizes.pop()


def _is_accepted(config: Any, kv_groups: int, sizes: BlockSizes) -> bool:
    smaller = copy.deepcopy(config).to_dict() | {
        "num_key_value_heads": kv_groups,
        "num_attention_heads": kv_groups * sizes.query_heads,
        "head_dim": sizes.head_dim,
    }
    try:
        type(config).from_dict(smaller)
    except Exception:  # whatever its kind, transformers would not load it
        return False
    return True
