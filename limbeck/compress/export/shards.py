"""A checkpoint's files: safetensors in one or several shards, and config."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from limbeck.checkpoint import write_json
from limbeck.models.load import locate
from limbeck.models.weight_files import INDEX, writing

SHARD_BYTES = 4_000_000_000


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> int:
    """Write tensors in the order given; more than one file gets the index that says where each tensor is.

    Args:
      directory: an existing one.
      tensors: names and tensors; at most one shard of them is held here at a time.
      shard_bytes: a shard is closed before it would exceed this.
    Returns: the bytes of all tensors.
    """
    parts = 0
    held: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            _save(held, _part(directory, parts))
            parts, held, size = parts + 1, {}, 0
        # A copy where the tensor is a view of another: safetensors stores each by itself.
        held[name] = tensor.detach().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    _save(held, _part(directory, parts))
    parts += 1
    if parts == 1:
        _part(directory, 0).rename(directory / "model.safetensors")
        return total
    for number in range(parts):
        _part(directory, number).rename(directory / f"model-{number + 1:05d}-of-{parts:05d}.safetensors")
    write_index(directory)
    return total


def write_index(directory: Path) -> None:
    """Write the index of a directory's weight files, for several of them or for one with other files beside it."""
    weight_map: dict[str, str] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            weight_map.update(dict.fromkeys(opened.keys(), file.name))
    total = sum((directory / file).stat().st_size for file in set(weight_map.values()))
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _save(held: dict[str, Tensor], path: Path) -> None:
    with writing(path):
        save_file(held, path, metadata={"format": "pt"})


def _part(directory: Path, number: int) -> Path:
    return directory / f"part-{number}.partial"


def config_tree(model: str, loaded: Any) -> dict[str, Any]:
    """config.json of a model: the local file, or what transformers writes for the loaded one where that is another."""
    place = locate(model)
    own = json.loads(loaded.config.to_json_string()) | {"architectures": [type(loaded).__name__]}
    tree = own
    if place.is_local and place.gguf_file is None:
        stored = json.loads((Path(place.path) / "config.json").read_text(encoding="utf-8"))
        # Of a model of several modalities the text part is loaded, and written.
        tree = stored if stored.get("model_type") == own.get("model_type") else own
    tree.pop("torch_dtype", None)
    tree["dtype"] = own.get("dtype") if "dtype" not in tree else tree["dtype"]
    return tree if is_tied(loaded) else tree | {"tie_word_embeddings": False}


def is_tied(model: Any) -> bool:
    """Whether head and embedding are one; config.json may tie what the weights do not."""
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
    return bool(model.config.tie_word_embeddings) and (head is embedding or torch.equal(head, embedding))
