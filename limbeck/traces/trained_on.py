"""The traces that a model was trained on, as the manifests behind it name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.checkpoint import MANIFEST, Checkpoint
from limbeck.config import build
from limbeck.traces.sources import TraceConfig

_TRAINED = ("", "distill.")
"""Where the config of a stage has the traces that it trains on, and the student it begins with."""
_MADE_OF = ("model", "prune.model", *(f"{group}student.model" for group in _TRAINED))


def trained_on(model: str) -> Iterator[TraceConfig]:
    """The traces of a model, those of the model that it was made of, and so on, as far as manifests go."""
    for name in made_of(model):
        for group in _TRAINED:
            others = [source["traces"] for source in _at(_config(name), f"{group}sources") or []]
            for traces in filter(None, [_at(_config(name), f"{group}traces"), *others]):
                source = Checkpoint(Path(name)).path_of(traces["source"])
                yield build(TraceConfig, {**traces, "source": source}, f"{Path(name) / MANIFEST}: traces")


def made_of(model: str) -> Iterator[str]:
    """A model, the one that it was made of, and so on."""
    seen: set[str] = set()
    name: str | None = model
    while name is not None and name not in seen:
        yield name
        seen.add(name)
        config = _config(name)
        before = next((found for path in _MADE_OF if isinstance(found := _at(config, path), str)), None)
        name = None if before is None else Checkpoint(Path(name)).path_of(before)


def _config(model: str) -> Mapping[str, Any]:
    directory = Path(model)
    found: Mapping[str, Any] = Checkpoint(directory).manifest["config"] if (directory / MANIFEST).is_file() else {}
    return found


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config
