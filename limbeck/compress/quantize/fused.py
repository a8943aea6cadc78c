"""Layers that engines compute as one, which therefore need one scheme."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def parted(layers: Iterable[str], schemes: Mapping[str, Any]) -> list[str]:
    """What is wrong with layers of different schemes that vLLM fuses, in words.

    Args:
      layers: names of all linear layers.
      schemes: by name, of those that are quantised; the others are dense.
    """
    parents: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for layer in layers:
        parent, _, last = layer.rpartition(".")
        for together in _TOGETHER:
            if last in together:
                parents.setdefault((parent, together), []).append(layer)
    return [
        f"{', '.join(members)} have different schemes; vLLM computes them as one layer and refuses such a file"
        for members in parents.values()
        if len({schemes.get(member) for member in members}) > 1
    ]
