"""Seeds that nobody chose: independent between optimizers, equal on the ranks of one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_made: Counter[str] = Counter()
"""How many optimizers this process has made over parameters of each description."""


def agreed_seed(params: Iterable[Any]) -> int:
    """A seed drawn from torch's global generator; in a distributed job, the draw of whichever rank comes first.

    Replicas must add the same noise even where each rank has called `torch.manual_seed` with a number of its own. The
    ranks agree through the job's key-value store, which makes nobody wait: an optimizer that only one rank makes is no
    dead lock.

    Args:
      params: in any form that an optimizer takes; ranks agree on the n-th optimizer over parameters of these names,
        shapes and types.
    """
    seed = int(torch.randint(2**63 - 1, ()))
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return seed
    description = hashlib.blake2b(repr(list(_described(params))).encode(), digest_size=8).hexdigest()
    _made[description] += 1
    key = f"limbeck.optim.seed/{description}/{_made[description]}"
    try:
        return int(dist.distributed_c10d._get_default_store().compare_set(key, "", str(seed)))
    except (RuntimeError, NotImplementedError):
        # A back end that only pretends to have other ranks keeps no store.
        return seed


def _described(params: Iterable[Any]) -> Iterable[tuple]:
    for item in params:
        if isinstance(item, dict):
            group = item["params"]
            yield from _described([group] if isinstance(group, Tensor) else group)
        else:
            name, tensor = item if isinstance(item, tuple) else ("", item)
            yield name, tuple(tensor.shape), str(tensor.dtype)
