"""JSON files that runs left behind, checked while they are read: every number in them is finite."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.errors import CheckpointError


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises: CheckpointError when the file is missing, is no JSON object, or holds NaN or infinity.
    """
    tree = _read(file)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: must hold a JSON object; found {type(tree).__name__}. Make it again.")
    return tree


def read_list(file: Path) -> list[Any]:
    """A JSON list from a file.

    Raises: CheckpointError as `read_object`.
    """
    tree = _read(file)
    if not isinstance(tree, list):
        raise CheckpointError(f"{file}: must hold a JSON list; found {type(tree).__name__}. Make it again.")
    return tree


def object_in(tree: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    """The object that a tree holds under `name`; empty where there is none.

    Raises: CheckpointError when something else stands there; `file` names the place.
    """
    value = tree.get(name)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{file}: `{name}` must be a JSON object; found {type(value).__name__}. Make it again.")
    return value or {}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error.strerror}); run the sweep or the evaluation again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({' '.join(str(error).split())}); make it again.") from error


def _no_constant(text: str) -> float:
    raise ValueError(f"found {text}, which is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"found {text}, which is out of range")
    return value
