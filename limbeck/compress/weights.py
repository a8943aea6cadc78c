"""Weights by name, one block at a time: reading them from safetensors files, writing them as shards.

A model larger than memory is never whole in it: a block is read, worked on, written and dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from limbeck.checkpoint import write_json
from limbeck.errors import CompressionError, ModelError
from limbeck.models.load import load_model, locate, quantization_at
from limbeck.models.weight_files import INDEX, names_in, stored_dtype, tensor_files, write_tensors


class WeightSource(Protocol):
    """Tensors by their name in the model's state dict."""

    def names(self) -> set[str]: ...

    def tensor(self, name: str) -> Tensor: ...

    def shape(self, name: str) -> list[int]: ...

    def as_stored(self, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the names of the checkpoint that they came from."""
        ...


class SafetensorSource:
    """The safetensors files of a directory; a tensor is read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._file_of = tensor_files(directory)

    def names(self) -> set[str]:
        """All names."""
        return set(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        with safe_open(self._file_of[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """The shape of one tensor, from the header."""
        with safe_open(self._file_of[name], framework="pt") as opened:
            return list(opened.get_slice(name).get_shape())

    def as_stored(self, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The names are those of the files already."""
        return tensors


class LoadedSource:
    """A model in memory, for formats whose names differ from the model's (GGUF, experts in one file each)."""

    def __init__(self, model: Any, *, has_own_names: bool) -> None:
        self._state, self._has_own_names = model.state_dict(), has_own_names

    def names(self) -> set[str]:
        """All names."""
        return set(self._state)

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self._state[name]

    def shape(self, name: str) -> list[int]:
        """The shape of one tensor."""
        return list(self._state[name].shape)

    def as_stored(self, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """By the names that engines know: transformers' own way back from what it made of them."""
        return revert_weight_conversion(model, tensors) if self._has_own_names else tensors


class StoredSize(NamedTuple):
    """Size of a checkpoint's weights."""

    parameters: int
    """Weights, however many bits each takes; neither scales nor masks."""
    bytes: int
    """Of the files, without the mask beside them."""


def stored_size(directory: Path) -> StoredSize:
    """Size of what a model's safetensors files hold, packed or not; only their headers are read.

    Raises: ModelError for a damaged file.
    """
    files = tensor_files(directory)
    parameters = 0
    for file in set(files.values()):
        with safe_open(file, framework="pt") as opened:
            parameters += sum(_count(opened, name) for name, place in files.items() if place == file)
    return StoredSize(parameters, sum(file.stat().st_size for file in set(files.values())))


def _count(opened: Any, name: str) -> int:
    """Weights of a tensor; those of a packed one are counted by its `weight_shape`."""
    if name.endswith((".weight_packed", "_scale")):
        return 0
    if name.endswith(".weight_shape"):
        return math.prod(opened.get_tensor(name).tolist())
    return math.prod(opened.get_slice(name).get_shape())


def dtype_of(name: str) -> torch.dtype:
    """The dtype that a model's weights are stored in: by its files, for the hub by its config, float32 for GGUF."""
    place = locate(name)
    if place.gguf_file is not None:
        return torch.float32
    if place.is_local:
        return stored_dtype(Path(place.path))
    config = transformers.AutoConfig.from_pretrained(place.path)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def open_weights(name: str, model: Any, needed: set[str]) -> WeightSource:
    """Stream from the files where they hold all the needed names, else load the model once.

    Args:
      name: of the model; `model` is its skeleton.
      needed: names of its state dict.
    Raises: ModelError for a quantised model, whose int8 codes would pass for weights, and for weights of another model
      than config.json describes.
    """
    if quantization_at(name) is not None:
        raise ModelError(
            f"{name}: is quantised; compress the model that it was made of, or make it dense first: limbeck export "
            f"--format dense --model {name}"
        )
    place = locate(name)
    if place.is_local and place.gguf_file is None:
        source = SafetensorSource(Path(place.path))
        if needed <= source.names():
            _check_fit(name, model, source, needed)
            return source
    loaded = LoadedSource(
        load_model(name, dtype_of(name), device="cpu", whole=True), has_own_names=place.gguf_file is None
    )
    if missing := needed - loaded.names():
        raise ModelError(f"{name}: its text part has no weight {min(missing)}; such a model is not compressed.")
    return loaded


def _check_fit(name: str, model: Any, source: SafetensorSource, needed: set[str]) -> None:
    """What loading the model would check, from headers: every tensor has a place, and the shape of its place."""
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    for key in sorted(needed):
        if source.shape(key) != shapes[key]:
            raise ModelError(
                f"{name}: {key} has shape {source.shape(key)} in the file and {shapes[key]} by config.json; they are "
                "of different models."
            )
    ignored = ("rotary_emb.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ()))  # as in from_pretrained
    extra = [key for key in source.names() - shapes.keys() if not any(re.search(pattern, key) for pattern in ignored)]
    if extra:
        raise ModelError(
            f"{name}: its config has no place for weight {min(extra)} ({len(extra)} in all); config.json and the "
            "weights are of different models."
        )


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype.

    Raises: CompressionError where that has no number as large.
    """
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored).all()) and bool(torch.isfinite(tensor).all()):
        raise CompressionError(
            f"{name}: holds {float(tensor.abs().max()):.4g}, beyond what {str(dtype).removeprefix('torch.')} holds "
            f"({torch.finfo(dtype).max:.4g}); choose bfloat16 or float32."
        )
    return stored


class ShardWriter:
    """Writes numbered safetensors shards, each through a temporary name, and the index at the end."""

    def __init__(self, directory: Path, count: int, stem: str = "model") -> None:
        self.directory, self._count, self._stem = directory, count, stem

    def path(self, number: int) -> Path:
        """Shard `number`, counted from 0."""
        return self.directory / f"{self._stem}-{number + 1:05d}-of-{self._count:05d}.safetensors"

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard."""
        write_tensors(self.path(number), tensors)

    def finish(self) -> int:
        """Write the index; returns the bytes of all files."""
        paths = [self.path(number) for number in range(self._count)]
        weight_map = {name: path.name for path in paths for name in names_in(path)}
        total = sum(path.stat().st_size for path in paths)
        tree = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.directory / INDEX, tree)
        return total
