"""Weights by name, one block at a time: reading them from safetensors files, writing them as shards.

A model larger than memory is never whole in it: a block is read, worked on, written and dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from limbeck.compress.masks import MASK_FILE
from limbeck.errors import ModelError
from limbeck.models.load import load_model, locate, quantization_at

INDEX = "model.safetensors.index.json"


class WeightSource(Protocol):
    """Tensors by their name in the model's state dict."""

    def names(self) -> set[str]: ...

    def tensor(self, name: str) -> Tensor: ...


class SafetensorSource:
    """The safetensors files of a directory; a tensor is read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._file_of: dict[str, Path] = {}
        for file in sorted(directory.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    self._file_of.update(dict.fromkeys(opened.keys(), file))
            except SafetensorError as error:
                raise ModelError(f"{file}: cannot be read ({error}); fetch or make it again.") from error

    def names(self) -> set[str]:
        """All names."""
        return set(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        with safe_open(self._file_of[name], framework="pt") as opened:
            return opened.get_tensor(name)


class LoadedSource:
    """A model in memory, for formats whose names differ from the model's (GGUF, experts in one file each)."""

    def __init__(self, model: Any) -> None:
        self._state = model.state_dict()

    def names(self) -> set[str]:
        """All names."""
        return set(self._state)

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self._state[name]


class StoredSize(NamedTuple):
    """Size of a checkpoint's weights."""

    parameters: int
    """Weights, however many bits each takes; neither scales nor masks."""
    bytes: int
    """Of the files, without the mask beside them."""


def stored_size(directory: Path) -> StoredSize:
    """Size of what the safetensors files of a directory hold, packed or not; only their headers are read.

    Raises: ModelError for a damaged file.
    """
    parameters, size = 0, 0
    for file in sorted(set(directory.glob("*.safetensors")) - {directory / MASK_FILE}):
        size += file.stat().st_size
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    parameters += _count(opened, name)
        except SafetensorError as error:
            raise ModelError(f"{file}: cannot be read ({error}); fetch or make it again.") from error
    return StoredSize(parameters, size)


def _count(opened: Any, name: str) -> int:
    """Weights of a tensor; those of a packed one are counted by its `weight_shape`."""
    if name.endswith((".weight_packed", "_scale")):
        return 0
    if name.endswith(".weight_shape"):
        return math.prod(opened.get_tensor(name).tolist())
    return math.prod(opened.get_slice(name).get_shape())


def open_weights(name: str, needed: Iterable[str]) -> WeightSource:
    """Stream from the files where they hold all the needed names, else load the model once.

    Raises: ModelError for a quantised model, whose int8 codes would pass for weights.
    """
    if quantization_at(name) is not None:
        raise ModelError(
            f"{name}: is quantised; compress the model that it was made of, or make it dense first: limbeck export "
            f"--format dense --model {name}"
        )
    place = locate(name)
    if place.is_local and place.gguf_file is None:
        source = SafetensorSource(Path(place.path))
        if set(needed) <= source.names():
            return source
    return LoadedSource(load_model(name, dtype=torch.float32))


class ShardWriter:
    """Writes numbered safetensors shards, each through a temporary name, and the index at the end."""

    def __init__(self, directory: Path, count: int, stem: str = "model") -> None:
        self.directory, self._count, self._stem = directory, count, stem

    def path(self, number: int) -> Path:
        """Shard `number`, counted from 0."""
        return self.directory / f"{self._stem}-{number + 1:05d}-of-{self._count:05d}.safetensors"

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard."""
        path = self.path(number)
        partial = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
        partial.replace(path)

    def finish(self) -> int:
        """Write the index; returns the bytes of all tensors."""
        weight_map, total = {}, 0
        for number in range(self._count):
            path = self.path(number)
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    weight_map[name] = path.name
            total += path.stat().st_size
        tree = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.directory / INDEX).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        return total
