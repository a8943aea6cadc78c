"""Which files of a directory hold a model's tensors, what they say of them, and writing such a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from limbeck.errors import CheckpointError, ModelError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of dense weights; codes have others."""


def tensor_files(directory: Path) -> dict[str, Path]:
    """The file of every tensor: what the index names, or model.safetensors, or else all safetensors files.

    Files beside them (a mask, shards of an older upload) are no part of the model: engines read the index too.
    Raises: ModelError for a damaged file, or an index that does not fit its files.
    """
    index = directory / INDEX
    if index.is_file():
        return _indexed(index)
    files = [directory / WEIGHTS] if (directory / WEIGHTS).is_file() else sorted(directory.glob("*.safetensors"))
    return {name: file for file in files for name in names_in(file)}


def names_in(file: Path) -> list[str]:
    """The tensors of one file.

    Raises: ModelError when it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); fetch or make it again.") from error


def _indexed(index: Path) -> dict[str, Path]:
    try:
        tree = json.loads(index.read_text(encoding="utf-8"))
        found = {str(name): index.parent / str(file) for name, file in tree["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a safetensors index ({error}); fetch or make it again.") from error
    held = {file: set(names_in(file)) for file in sorted(set(found.values()))}
    for name, file in found.items():
        if name not in held[file]:
            raise ModelError(f"{index}: says that {name} is in {file.name}, where it is not; fetch the files again.")
    # What a file holds beyond the index is read by transformers all the same.
    return {name: file for file, names in held.items() for name in names} | found


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of most of a directory's dense weights, whatever config.json says; float32 where there is none."""
    counts: dict[torch.dtype, int] = {}
    files = tensor_files(directory)
    for file in set(files.values()):
        with safe_open(file, framework="pt") as opened:
            for name in (name for name, place in files.items() if place == file):
                part = opened.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is not None and not name.endswith("_scale"):
                    counts[dtype] = counts.get(dtype, 0) + torch.Size(part.get_shape()).numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file through a temporary name.

    Raises: CheckpointError when the disk does not take it.
    """
    partial = path.with_suffix(".partial")
    with writing(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
        partial.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What a library raises when the disk is full becomes one line that names what could not be written."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({' '.join(str(error).split())}); is there space left on the disk?"
        ) from error
