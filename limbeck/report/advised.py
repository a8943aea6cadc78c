"""What looks at pairs left behind: their advice on cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.report.files import read_object

STAGE = "traces advise"


class Advised(NamedTuple):
    """One advice."""

    name: str
    advice: Mapping[str, Any]


def read_advice(paths: Sequence[Path]) -> list[Advised]:
    """The advice in each directory that `traces advise` wrote."""
    return [Advised(path.resolve().name, read_object(path / "advice.json")) for path in paths]
