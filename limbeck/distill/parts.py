"""Tensors of a state in parts: every process writes what it holds, and any number of processes reads it back.

torch's distributed checkpoint, in safetensors files (no pickle): each file says where its tensors lie in the whole
ones, so a reader takes the pieces that overlap its own part, whoever wrote them. Names are those of a state in one
piece, which the same reader reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

WHOLE = "whole.safetensors"
"""What no process holds a part of: numbers that optimizers count in tensors."""


def save_parts(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's parts of all tensors; all processes must call it."""
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    in_parts = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    dcp.save(in_parts, storage_writer=writer, no_dist=not dist.is_initialized())
    if not dist.is_initialized() or dist.get_rank() == 0:
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if name not in in_parts}
        save_file(whole, directory / WHOLE)


def read_parts(directory: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets`, whole or in parts, from the files that hold them; all processes must call it.

    Raises: ValueError when the files do not hold all of them.
    """
    numbers = {name: tensor for name, tensor in targets.items() if tensor.ndim == 0}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in numbers.keys() & set(opened.keys()):
                numbers[name].copy_(opened.get_tensor(name))
    rest = {name: tensor for name, tensor in targets.items() if tensor.ndim}
    alone = not any(isinstance(tensor, DTensor) for tensor in rest.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # just what `alone` says
        try:
            dcp.load(rest, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=alone)
        except CheckpointException as error:  # no Exception to Python
            raise ValueError(f"{directory}: {error}") from error


def kinds_in(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and dtype of every whole tensor by name."""
    found: dict[str, Any] = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in found.items()}
