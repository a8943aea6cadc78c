"""The trace files of a directory: of one split and one subset, by the names of files and folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from limbeck.errors import TraceFormatError, nearest
from limbeck.traces.files import SUFFIXES, kind_of

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "valid",
    "val": "val",
    "dev": "dev",
    "test": "test",
    "testing": "test",
}
"""Words of names, and the split that they tell."""
RECORDS = (
    *("limbeck.json", "skipped.json", "pass_rates.json", "summary.json", "config.json"),
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
)
"""Files beside traces that hold none."""
DATA = (".csv", ".tsv", ".arrow", ".txt", ".zip", ".tar", ".tgz", ".pkl", ".xlsx", ".json", ".feather", ".npz")
"""Suffixes of files that may hold data; one that is not read is told."""


class Found(NamedTuple):
    """What is read of a directory."""

    files: list[Path]
    notes: list[str]
    """What is left out or put together, for the console."""


def _present(directory: Path) -> list[Path]:
    """The files that a directory holds but for records of how it was made; of a stage's output its traces alone."""
    found = sorted(path for path in directory.rglob("*") if path.is_file() and not _is_hidden(path, directory))
    made = directory / "traces.jsonl"
    if (directory / "limbeck.json") in found and made in found:
        return [made]
    return [path for path in found if path.name not in RECORDS]


def _but(paths: list[Path], taken: list[Path]) -> list[Path]:
    return [path for path in paths if path not in taken]


def trace_files(directory: Path, split: str | None, subset: str | None) -> Found:
    """The trace files of `directory`, those of one split when their names tell several.

    Without a wish, files for testing and validation are left out where others are there.
    Raises: TraceFormatError when there is none, or none of `split` or `subset`.
    """
    present = _present(directory)
    files = [path for path in present if kind_of(path) is not None]
    if not files:
        raise TraceFormatError(
            f"{directory}: the directory holds no trace files; expected {', '.join(SUFFIXES)}, or what "
            "datasets.save_to_disk wrote."
        )
    others = [path for path in _but(present, files) if path.suffix.lower() in DATA]
    notes = _left_out(directory, others, "of another kind")
    files, folder_notes = _of_subset(directory, files, subset)
    files, split_notes = _of_split(directory, files, split)
    return Found(files, [*notes, *folder_notes, *split_notes, *_of_kinds(directory, files)])


def choose_split(available: list[str], wanted: str | None, where: str) -> str:
    """The split asked for; without a wish `train`, or the only one.

    Raises: TraceFormatError when the choice is open or the wish is not there.
    """
    if wanted is None and len(available) == 1:
        return available[0]
    chosen = wanted or "train"
    if chosen in available:
        return chosen
    known = ", ".join(available) or "none"
    raise TraceFormatError(f"{where}: there is no split {chosen!r}; the splits are {known}: set split to one of them.")


def split_of(relative: Path) -> str | None:
    """The split that the name of a file or of a folder around it tells, as in `mydata_train.jsonl`; None where it tells
    none or several."""
    for part in (relative.name, *reversed(relative.parts[:-1])):
        told = {SPLITS[word] for word in re.split(r"[-_.\s]", part.lower()) if word in SPLITS}
        if told:
            return told.pop() if len(told) == 1 else None
    return None


def _of_split(directory: Path, files: list[Path], split: str | None) -> tuple[list[Path], list[str]]:
    splits = {path: split_of(path.relative_to(directory)) for path in files}
    named = sorted(filter(None, set(splits.values())))
    if not named and split is None:
        return files, []
    wanted = None
    if split is not None or None not in splits.values() or "train" in named:
        wanted = choose_split(named, split, str(directory))
    kept = [path for path in files if splits[path] == wanted]
    return kept, _left_out(directory, _but(files, kept), "of another split, set split")


def _of_subset(directory: Path, files: list[Path], subset: str | None) -> tuple[list[Path], list[str]]:
    folders = {path: _folders(path.relative_to(directory)) for path in files}
    known = sorted({name for names in folders.values() for name in names})
    if subset is not None:
        kept = [path for path in files if subset in folders[path]]
        if not kept:
            raise TraceFormatError(f"{directory}: there is no subset (folder) {subset!r}; {nearest(subset, known)}")
        return kept, _left_out(directory, _but(files, kept), "of another subset")
    if len(set(folders.values())) < 2:
        return files, []
    return files, [f"{directory}: files of several folders are read together ({', '.join(known)}); subset reads one"]


def _of_kinds(directory: Path, files: Sequence[Path]) -> list[str]:
    if len({kind_of(path) for path in files}) < 2:
        return []
    return [f"{directory}: files of several kinds are read together: {_names(directory, files)}"]


def _folders(relative: Path) -> tuple[str, ...]:
    """The folders around a file that are no splits."""
    return tuple(part for part in relative.parts[:-1] if split_of(Path(part)) is None and part != "data")


def _left_out(directory: Path, paths: Sequence[Path], why: str) -> list[str]:
    if not paths:
        return []
    return [
        f"{directory}: {len(paths)} file{'s' if len(paths) > 1 else ''} not read ({why}): {_names(directory, paths)}"
    ]


def _names(directory: Path, paths: Sequence[Path]) -> str:
    return ", ".join(str(path.relative_to(directory)) for path in paths[:4]) + (", ..." if len(paths) > 4 else "")


def _is_hidden(path: Path, directory: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(directory).parts)
