"""Whether a pipeline that was brought to its end still is: answered from sizes and times of files, in a moment.

Building a recipe's config imports the libraries of all its stages, which takes longer than the answer. So the last call
leaves behind what it was asked and how every file looked that any stage read or wrote; where nothing of that differs,
there is nothing to do. In all other cases the whole way is gone: this module never says why something has to run.

It imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck import __version__
from limbeck.checkpoint import write_json
from limbeck.pipeline.hashes import stamp_of
from limbeck.pipeline.record import STATE

FILE = "finished.json"
_SAYS_NOTHING = ("--json", "--debug")
_ASKS_MORE = ("--help", "-h", "--dry-run", "--out=")
"""Arguments that this answer is not for; `--out DIR` is."""


def answer(arguments: Sequence[str]) -> bool:
    """Answer `limbeck pipeline ARGUMENTS` where nothing is to be done; returns whether that was so."""
    found = _read(arguments)
    if found is None:
        return False
    result = found["result"]
    print(f"pipeline: {found['stages']} stages, all unchanged", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps(result))
    else:
        print("\n".join(f"{key}: {value}" for key, value in result.items() if not isinstance(value, list)))
    return True


def remember(
    arguments: Sequence[str], out: Path, files: Iterable[Path], result: Mapping[str, Any], stages: int
) -> None:
    """Leave behind what a call that ended well was asked, and how all files looked then."""
    asked = _asked(arguments)
    if asked is not None and asked[1].resolve() == out.resolve():
        stamps = {str(path.absolute()): stamp_of(path) for path in sorted(set(files))}
        tree = {"asked": asked[0], "files": stamps, "result": dict(result), "stages": stages}
        write_json(out / STATE / FILE, tree)


def forget(out: Path) -> None:
    """Something is about to change."""
    (out / STATE / FILE).unlink(missing_ok=True)


def _read(arguments: Sequence[str]) -> dict[str, Any] | None:
    asked = _asked(arguments)
    if asked is None:
        return None
    try:
        found = json.loads((asked[1] / STATE / FILE).read_text(encoding="utf-8"))
        is_same = found["asked"] == asked[0] and all(
            stamp_of(Path(name)) == was for name, was in found["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if is_same else None


def _asked(arguments: Sequence[str]) -> tuple[str, Path] | None:
    """A hash of recipe, flags and directory, and the directory of the output; None where it is no plain call."""
    rest = [argument for argument in arguments if argument not in _SAYS_NOTHING]
    out = Path("runs") / "pipeline"
    if "--out" in rest[:-1]:
        place = rest.index("--out")
        out = Path(rest[place + 1])
        del rest[place : place + 2]
    if not rest or any(argument.startswith(_ASKS_MORE) for argument in rest):
        return None
    try:
        recipe = Path(rest[0]).read_bytes().decode("utf-8", "replace")
    except OSError:
        return None
    told = json.dumps([__version__, str(Path.cwd()), str(out.absolute()), recipe, rest[1:]])
    return hashlib.sha256(told.encode()).hexdigest(), out
