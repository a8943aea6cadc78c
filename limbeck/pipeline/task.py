"""A task of a pipeline: a config, the stage that carries it out, where it writes, and which of its files others read.

Configs name the outputs of other stages as `OUT/PLACE`, so that a stage's key does not depend on where the pipeline
works; `resolved` puts the directory there when the stage runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.checkpoint import RECORDS, STATE_PREFIX
from limbeck.config import build, to_dict
from limbeck.stage import Stage

OUT = "OUT/"
"""Begins the path of what another stage wrote."""
NAMING = frozenset(
    ("model", "teacher", "tokenizer", "reference", "source", "text", "moments", "cache", "choice", "exported", "path")
)
"""Fields of stage configs that name a model, a file or a directory."""

Call = Stage | Callable[[Any, Path, bool], Any]
"""A stage, or call(config, directory, resume); with `resume`, an attempt of the same config is there to go on with."""


class Task(NamedTuple):
    """One line of the plan."""

    name: str
    config: Any
    """A frozen dataclass."""
    call: Call
    """A function of a module, so that a process of its own can be told to call it."""
    place: str
    """Its directory, below that of the pipeline; empty for that one itself."""
    gives: tuple[str, ...] = ()
    """Patterns of the files whose bytes later stages depend on; none: those of a model directory or of traces."""
    files: tuple[str, ...] = ("**/*",)
    """Patterns of all files that it writes, by which damage is noticed."""
    is_filled_in_place: bool = False
    """Whether an output of another config is added to, not replaced."""
    is_isolated: bool = True
    """Whether it runs in a process of its own; not so where its parts do."""
    follows: tuple[str, ...] = ()
    """Stages whose records it reads: it runs again whenever one of them did."""

    def directory(self, out: Path) -> Path:
        """Where it writes."""
        return out / self.place

    def written(self, out: Path) -> list[Path]:
        """All files at its place, sorted; right after it ran, those are its own."""
        return self._files(out, self.files)

    def given(self, out: Path) -> list[Path]:
        """The files that later stages depend on, sorted."""
        if self.gives:
            return self._files(out, self.gives)
        return [path for path in self._files(out, ("*",)) if path.name not in RECORDS]

    def _files(self, out: Path, patterns: Sequence[str]) -> list[Path]:
        """Files by pattern, without the states that a kill in the last moment of a stage can leave behind."""
        found = {path for pattern in patterns for path in self.directory(out).glob(pattern)}
        return sorted(path for path in found if path.is_file() and not path.name.startswith(STATE_PREFIX))


def named(config: Any) -> Iterator[str]:
    """Every model, file or directory that a config names, each once, in order."""
    yield from dict.fromkeys(_named(to_dict(config)))


def _named(tree: Any, key: str = "") -> Iterator[str]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _named(value, str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from _named(value, key)
    elif isinstance(tree, str) and tree and (key in NAMING or tree.startswith(OUT)):
        yield tree


def resolved(config: Any, out: Path) -> Any:
    """The config with the pipeline's directory in place of OUT."""
    return build(type(config), _resolved(to_dict(config), out))


def _resolved(tree: Any, out: Path) -> Any:
    if isinstance(tree, Mapping):
        return {key: _resolved(value, out) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_resolved(value, out) for value in tree]
    if isinstance(tree, str) and tree.startswith(OUT):
        return str(out / tree.removeprefix(OUT))
    return tree
