"""Checkpoint: a directory with a manifest. Every stage reads and writes them; nothing half-written gets the final name.

`limbeck.json` holds what made the directory: stage, resolved config and its hash, inputs by hash, seeds, versions,
the cost ledger and the metrics. A stage works in `<out>.partial` and renames it when all is written.
"""

from __future__ import annotations

import fcntl
import hashlib
import html
import importlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from limbeck import placement
from limbeck.config import config_hash, to_dict
from limbeck.errors import CheckpointError, ConfigError
from limbeck.version import __version__

MANIFEST = "limbeck.json"
FORMAT = 2
"""Version of the manifest. 1, which did not say so, had everything but `format`; both are read."""
STATE_PREFIX = "state-"
"""How the saved states of a run that is under way are named, in its working directory."""
RECORDS = (MANIFEST, "metrics.jsonl", "layers.json", "certificate.json", "certificate.md", "README.md")
"""Files that tell how a model was made and what it is worth; they are no part of it and do not count in its hash."""
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "datasets")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory that a stage made, or a bare model directory without a manifest."""

    path: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises: CheckpointError when it is missing or damaged.
        """
        file = self.path / MANIFEST
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path}: no {MANIFEST}; this is no finished limbeck output.") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{file}: not valid JSON ({' '.join(str(error).split())}); make the output again."
            ) from error
        if not isinstance(tree, dict) or "stage" not in tree:
            raise CheckpointError(f"{file}: not a limbeck manifest (no `stage`).")
        if tree.get("format", 1) > FORMAT:
            raise CheckpointError(
                f"{file}: written by a newer limbeck ({tree.get('limbeck_version')}); update this one."
            )
        return tree

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage measured."""
        return self.manifest["metrics"]

    @property
    def cost(self) -> dict[str, Any]:
        """What it took: tokens, FLOPs, seconds and bytes, by part and phase; empty where the stage counts nothing."""
        return self.manifest["ledger"]

    def path_of(self, name: str) -> str:
        """A model, file or directory that the config names, as from here: relative names are of where it was called."""
        called_from = Path(self.manifest.get("called_from", ""))
        there = called_from / Path(name).expanduser()
        return str(there) if called_from != Path.cwd() and there.exists() else name

    def load(self) -> tuple[Any, Any]:
        """The transformers model and its tokenizer."""
        # Whoever asks for a model has torch and transformers; what only reads manifests need not import them.
        models = importlib.import_module("limbeck.models.load")
        return models.load_model(str(self.path)), models.load_tokenizer(str(self.path))

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """A table for notebooks: what made it and what it measured."""
        if not self.is_finished:
            return f"<code>{html.escape(str(self.path))}</code>"
        manifest = self.manifest
        rows = {"stage": manifest["stage"], **{k: v for k, v in manifest["metrics"].items() if _is_plain(v)}}
        cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(_shown(v))}</td></tr>" for k, v in rows.items())
        return f"<table><caption><code>{html.escape(str(self.path))}</code></caption>{cells}</table>"

    @property
    def is_finished(self) -> bool:
        """Whether a readable manifest is there."""
        return (self.path / MANIFEST).is_file()

    def is_made_of(self, config: Any, inputs: Mapping[str, str]) -> bool:
        """Whether this is the finished output of this config and these inputs."""
        if not self.is_finished:
            return False
        manifest = self.manifest
        return manifest["config_hash"] == config_hash(config) and manifest["inputs"] == dict(inputs)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def local_directory(out: str | os.PathLike[str]) -> Path:
    """Where a stage is to write.

    Raises: ConfigError for an address of another store, which would become a local directory of that name.
    """
    text = os.fspath(out)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ConfigError(
            f"out {text}: outputs are written to local directories; write there and copy it (aws s3 cp --recursive, "
            "gsutil, hf upload), or mount the store and name the mount."
        )
    return Path(text)


@contextmanager
def output_directory(out: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """A working directory that takes the name `out` when the block ends well, and goes when it does not.

    Args:
      out: the final directory; it must not exist unless `overwrite`.
      overwrite: replace an existing output, after the new one is complete.
      resume: go on in the working directory of an interrupted run. Without it that directory is emptied, unless it
        has a state to go on from: that goes with `overwrite` only.
    Raises: CheckpointError when `out` exists, when it is to be replaced and no stage made it, when another process
      works on it, or when there is a state and neither `resume` nor `overwrite`.
    """
    _refuse_to_lose(out, overwrite)
    working = out.with_name(out.name + ".partial")
    created = [path for path in (working, *working.parents) if not path.exists()]
    working.mkdir(parents=True, exist_ok=True)
    with _alone(working):
        if not resume:
            _empty(working, overwrite)
        try:
            yield working
        except BaseException:
            _clean_up(working, created)
            raise
        if out.exists():
            shutil.rmtree(out)
        working.rename(out)


def _refuse_to_lose(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out}: exists already. Choose another output or pass --overwrite.")
    if out.exists() and not _is_replaceable(out):
        raise CheckpointError(f"{out}: no limbeck output, so it is not overwritten. Choose another output.")


def _clean_up(working: Path, created: Sequence[Path]) -> None:
    """A failed run leaves nothing, unless it has a state to resume from."""
    if not any(working.glob(STATE_PREFIX + "*")):
        shutil.rmtree(working, ignore_errors=True)
    for path in created:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


@contextmanager
def _alone(working: Path) -> Iterator[None]:
    """No other process works in a directory during the block."""
    directory = os.open(working, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{working}: another run is at work there; wait, or choose another --out.") from error
        yield
    finally:
        os.close(directory)


def _empty(working: Path, overwrite: bool) -> None:
    """Put away what an interrupted attempt left; a state goes only where its loss is asked for."""
    states = sorted(path.name for path in working.glob(STATE_PREFIX + "*"))
    if states and not overwrite:
        raise CheckpointError(
            f"{working}: an interrupted run left {states[-1]}. Pass --resume to go on with it, --overwrite to drop it."
        )
    for path in working.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_replaceable(out: Path) -> bool:
    return out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))


def write_manifest(
    directory: Path,
    *,
    stage: str,
    config: Any,
    inputs: Mapping[str, str],
    ledger: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    counts: Mapping[str, Any] | None = None,
) -> None:
    """Write `limbeck.json`; call it last, since its presence says that the output is complete."""
    write_json(
        directory / MANIFEST,
        {
            "stage": stage,
            "format": FORMAT,
            "limbeck_version": __version__,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "called_from": str(Path.cwd()),
            "config": to_dict(config),
            "config_hash": config_hash(config),
            "inputs": dict(inputs),
            "versions": versions(),
            "machine": {
                "system": platform.system(),
                "processor": platform.machine(),
                "python": platform.python_version(),
                **placement.found(),
            },
            "ledger": dict(ledger or {}),
            "metrics": dict(metrics or {}),
            "counts": dict(counts or {}),
        },
    )


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, tree: Any) -> None:
    """Write JSON through a temporary name."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def hash_path(path: Path, of_file: Callable[[Path], str] | None = None) -> str:
    """Sixteen hex digits of a file, or of the model files in a directory: weights, config, tokenizer.

    Args:
      of_file: gives the hash of a file's bytes; `hash_file` when None.
    """
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and p.name not in RECORDS)
    lines = "".join(f"{file.name} {(of_file or hash_file)(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
