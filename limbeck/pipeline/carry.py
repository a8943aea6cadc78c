"""One stage, carried out in the process that calls it.

The modules of all stages are imported here, so that the server that the processes of stages are forked from has them
loaded already.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from limbeck.errors import CheckpointError
from limbeck.ledger import Ledger
from limbeck.pipeline import stages, telling
from limbeck.pipeline.stage import Call
from limbeck.progress import console

PRELOADED = (stages, telling)


def carry_out(call: Call, config: Any, directory: Path, resume: bool) -> dict[str, Any]:
    """Run one stage in this process; returns what it took, and what its call says of it.

    An interrupted attempt whose state cannot be read is begun anew.
    """
    ledger, start = Ledger(), time.perf_counter()
    with ledger.phase("stage"):
        try:
            said = call(config, directory, resume)
        except CheckpointError as error:
            if not resume:
                raise
            say(f"starting anew: {error}")
            remove_working(directory)
            said = call(config, directory, False)
    measured = {"seconds": time.perf_counter() - start, "peak_bytes": ledger.peak_bytes["stage"]}
    return measured | (said or {})


def remove_working(directory: Path) -> None:
    """Put away what an interrupted attempt has left."""
    shutil.rmtree(directory.with_name(directory.name + ".partial"), ignore_errors=True)


def say(text: str) -> None:
    """A line on the console."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
