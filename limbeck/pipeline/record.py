"""What is remembered of a finished stage, and why it would have to run again.

    key = hash of the stage's name, its config and the hashes of all that it reads

A record is `OUT/state/NAME.json`. A stage is not run again when its record has the same key and its files still have
the hashes that were written there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from limbeck.checkpoint import MANIFEST, hash_file, write_json
from limbeck.config import config_hash, to_dict
from limbeck.pipeline.hashes import FileHashes
from limbeck.pipeline.task import OUT, Task

STATE = "state"
"""Directory of the records, below that of the pipeline."""
RECORD_OF = "record of "
"""Begins the name of an input that is the record of a stage."""
RAN = "ran.json"
"""Names of the stages that the last call has run so far, in that directory."""
_SHOWN = 3
"""Fields that are named when a stage runs again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One finished stage."""

    stage: str
    key: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Hash of everything that it read, by name."""
    files: Mapping[str, str]
    """Hash of everything that it wrote, by path below its directory."""
    gives: str
    """Hash of what later stages depend on."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """seconds, peak_bytes, and tokens and flops where the stage counts them."""
    predicted: Mapping[str, Any] | None = None
    """What was expected of it before it ran, under the same names."""

    @property
    def identity(self) -> str:
        """Changes whenever the stage runs, even where it gives what it gave before."""
        return config_hash(asdict(self))


def key_of(stage: Task, inputs: Mapping[str, str]) -> str:
    """Twelve hex digits that change with the config and with everything that is read."""
    return config_hash({"stage": stage.name, "config": to_dict(stage.config), "inputs": dict(inputs)})


def make_record(
    stage: Task,
    inputs: Mapping[str, str],
    out: Path,
    hashes: FileHashes,
    measured: Mapping[str, Any],
    predicted: Mapping[str, Any] | None,
) -> Record:
    """The record of a stage that has just ended."""
    base = stage.directory(out)
    return Record(
        stage=stage.name,
        key=key_of(stage, inputs),
        config=to_dict(stage.config),
        inputs=inputs,
        files={str(path.relative_to(base)): hashes.of(path) for path in stage.written(out)},
        gives=config_hash({str(path.relative_to(base)): hashes.of(path) for path in stage.given(out)}),
        measured=measured,
        predicted=predicted,
    )


def record_file(out: Path, name: str) -> Path:
    """Where the record of a stage is."""
    return out / STATE / f"{name}.json"


def read_record(out: Path, name: str) -> Record | None:
    """The record of a stage; None where there is none that can be read, and the stage then runs."""
    try:
        return Record(**json.loads(record_file(out, name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_record(out: Path, record: Record) -> None:
    """Remember a finished stage."""
    write_json(record_file(out, record.stage), asdict(record))


def why(stage: Task, record: Record | None, inputs: Mapping[str, str], out: Path, hashes: FileHashes) -> str | None:
    """Why a stage has to run, in a few words; None when it has not."""
    if record is None:
        return "not done yet"
    if record.key != key_of(stage, inputs):
        fields: Iterable[str] = () if stage.follows else _fields(record.config, to_dict(stage.config))
        return ", ".join(_short([*fields, *_inputs(record.inputs, inputs)])) or "the recipe changed"
    return _damage(record, stage.directory(out), hashes)


def _fields(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Every field that differs, as `path old -> new`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            yield from _fields(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
    elif before != after:
        yield f"{path} {_value(before)} -> {_value(after)}"


def _inputs(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    """Every input that is another one under the same name; new names show as fields already."""
    for name in after:
        if name in before and before[name] != after[name]:
            is_record = name.startswith(RECORD_OF)
            yield f"{name.removeprefix(RECORD_OF)} ran" if is_record else f"{name.removeprefix(OUT)} changed"


def _short(reasons: list[str]) -> list[str]:
    rest = len(reasons) - _SHOWN
    return [*reasons[:_SHOWN], *([f"and {rest} more"] if rest > 0 else [])]


def _damage(record: Record, base: Path, hashes: FileHashes) -> str | None:
    for name, expected in record.files.items():
        path = base / name
        if not path.is_file():
            return f"{path} is gone"
        if hashes.of(path) != expected:
            return f"{path} is damaged: not what the stage wrote"
    return None


def _value(value: Any) -> str:
    text = " ".join((json.dumps(value, default=str) if isinstance(value, Mapping | list) else str(value)).split())
    return text if len(text) <= 40 else text[:37] + "..."


@dataclass(frozen=True, slots=True)
class Attempt:
    """A stage that was begun, for an interruption to go on from."""

    key: str
    before: str | None
    """Hash of the manifest that stood at its place; None where there was none."""


def begin(out: Path, stage: Task, key: str) -> bool:
    """Note that a stage begins; returns whether an attempt of the same key was interrupted."""
    file = _attempt_file(out, stage)
    file.parent.mkdir(parents=True, exist_ok=True)
    earlier = _read_attempt(file)
    if earlier is not None and earlier.key == key:
        return True
    write_json(file, asdict(Attempt(key, manifest_hash(stage.directory(out)))))
    return False


def has_ended(out: Path, stage: Task) -> bool:
    """Whether the attempt that was begun has written its whole output: another manifest stands there than before."""
    attempt, now = _read_attempt(_attempt_file(out, stage)), manifest_hash(stage.directory(out))
    return attempt is not None and now is not None and now != attempt.before


def end(out: Path, stage: Task) -> None:
    """Forget the attempt, once the record is written."""
    _attempt_file(out, stage).unlink(missing_ok=True)


def manifest_hash(directory: Path) -> str | None:
    """Hash of a directory's manifest."""
    file = directory / MANIFEST
    return hash_file(file) if file.is_file() else None


def _attempt_file(out: Path, stage: Task) -> Path:
    return out / STATE / f"{stage.name}.begun"


def _read_attempt(file: Path) -> Attempt | None:
    try:
        return Attempt(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
