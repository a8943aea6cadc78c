"""What a long job has finished, on disk as it finishes: one JSON line an item, appended, never rewritten.

A process that is killed can leave at most one torn line, the last. Opening the journal again cuts it off; its item is
done anew. The first line names the job, so that results of another job are refused instead of mixed in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from limbeck.errors import CheckpointError

Key = tuple[str, int]
"""Prompt key and sample number."""


class Journal:
    """Finished items by key; the first record of a key counts.

    Args:
      path: the file; made when it is not there.
      job: identity of the job, equal on every start of it.
    Raises: CheckpointError when the file is of another job or damaged before its last line.
    """

    def __init__(self, path: Path, job: str) -> None:
        self.path = path
        self.records: dict[Key, dict[str, Any]] = {}
        whole = self._read(job) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(whole)
        if not whole:
            self._write([{"job": job}])

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: Key) -> bool:
        return key in self.records

    def add(self, records: Mapping[Key, dict[str, Any]]) -> None:
        """Append the records whose keys are new, and have them on disk when this returns."""
        new = {key: record for key, record in records.items() if key not in self.records}
        self._write({"prompt": key[0], "sample": key[1], **record} for key, record in new.items())
        self.records |= new

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        for line in lines:
            self._file.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, job: str) -> int:
        """Fill the records; the length in bytes of what is whole."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines()):
            try:
                record = json.loads(line)
                if number == 0:
                    found = record["job"]
                else:
                    self.records.setdefault((record.pop("prompt"), record.pop("sample")), record)
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{self.path}: line {number + 1} is damaged ({error}); delete {self.path.parent} and start anew."
                ) from error
        if whole and found != job:
            raise CheckpointError(
                f"{self.path.parent}: holds the unfinished work of another job (other prompts, model or sampling). "
                "Choose another output, or delete it."
            )
        return whole
