"""What runs logged step by step: the curves of metrics.jsonl over the tokens read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck.errors import CheckpointError
from limbeck.report.rows import Curve

FILE = "metrics.jsonl"
COLUMNS = ("loss", "validation_ce")


def read_curves(directory: Path) -> dict[str, Curve]:
    """The curves that a run logged, by the column of metrics.jsonl; none where it kept no log.

    Raises: CheckpointError when the log is damaged.
    """
    file = directory / FILE
    if not file.is_file():
        return {}
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {column: tuple(_points(lines, column)) for column in COLUMNS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged ({' '.join(str(error).split())[:80]}); train the run again.") from error


def _points(lines: Sequence[Mapping[str, Any]], column: str) -> Iterator[tuple[float, float]]:
    for line in lines:
        value = line.get(column)
        if value is not None and math.isfinite(value):
            yield float(line["tokens"]), float(value)
