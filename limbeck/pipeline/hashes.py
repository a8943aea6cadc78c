"""Hashes of files, remembered by size and time of change, so that an unchanged file of gigabytes is read once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from limbeck.checkpoint import hash_file, write_json


class FileHashes:
    """SHA-256 of files. Damage that leaves size and time of change as they were goes unseen until `file` is deleted."""

    def __init__(self, file: Path) -> None:
        """Read what is remembered in `file`, if it is there and whole."""
        self._file, self._known = file, _read(file)
        self._is_changed = False

    def of(self, path: Path) -> str:
        """The hash of a file's bytes."""
        name, stamp = str(path.resolve()), stamp_of(path)
        known = self._known.get(name)
        if known is None or known[:2] != stamp:
            known = self._known[name] = [*stamp, hash_file(path)]
            self._is_changed = True
        return str(known[2])

    def save(self) -> None:
        """Write what is remembered, where there is something new."""
        if self._is_changed:
            write_json(self._file, self._known)
            self._is_changed = False


def stamp_of(path: Path) -> list[int]:
    """Size in bytes and time of change in nanoseconds."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read(file: Path) -> dict[str, Sequence[int | str]]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # nothing is remembered; all is read again
    return {name: entry for name, entry in tree.items() if isinstance(entry, list) and len(entry) == 3}
