"""What takes long and is the same every time, kept beside other caches under the hash of what it is made of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from limbeck.progress import say


def keep(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all; one that cannot be written is done without."""
    working = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(working)
        working.replace(path)
    except OSError as error:
        say(f"note: {path.parent}: nothing is kept there ({error})")
