"""Which weights a pruned checkpoint keeps: one bit a weight, in a file beside it.

Sparse weights are stored dense, zeros and all, since that is what every engine loads; config.json says nothing of them.
The mask tells further training and quantisation which zeros are meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from limbeck.errors import CheckpointError

MASK_FILE = "mask.safetensors"
_SUFFIX = ".mask"
"""Behind the weights' names, so that a reader of all files in the directory takes none for a weight."""


def write_masks(directory: Path, masks: Mapping[str, Tensor]) -> Path:
    """Write `mask.safetensors`.

    Args:
      directory: of the checkpoint; it should have a safetensors index, since without one vLLM reads every file.
      masks: bool tensors by the name of the weight, True where it is kept.
    """
    bits = {name + _SUFFIX: np.packbits(mask.cpu().numpy(), bitorder="little") for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    path = directory / MASK_FILE
    partial = path.with_suffix(".partial")
    save_file(bits, partial, metadata={"shapes": json.dumps(shapes)})
    partial.replace(path)
    return path


def read_masks(directory: Path) -> dict[str, Tensor]:
    """The masks of a checkpoint, bool by the name of the weight; empty when it has none.

    Raises: CheckpointError for a damaged file.
    """
    path = directory / MASK_FILE
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="np") as opened:
            shapes = json.loads((opened.metadata() or {})["shapes"])
            packed = {name: opened.get_tensor(name + _SUFFIX) for name in shapes}
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not a mask file ({error}); prune the model again or remove it.") from error
    masks = {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        if len(packed[name]) != -(-count // 8):
            raise CheckpointError(f"{path}: {len(packed[name])} bytes for {name} {shape}; prune the model again.")
        flat = np.unpackbits(packed[name], count=count, bitorder="little")
        masks[name] = torch.from_numpy(flat.astype(bool)).view(shape)
    return masks
