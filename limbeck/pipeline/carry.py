"""One stage, carried out in the process that calls it.

The modules of all stages are imported here, so that the server that the processes of stages are forked from has them
loaded already.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from limbeck.errors import CheckpointError
from limbeck.ledger import Ledger
from limbeck.pipeline import stages, telling
from limbeck.pipeline.task import Call
from limbeck.progress import say
from limbeck.stage import How, Stage

PRELOADED = (stages, telling)


def carry_out(call: Call, config: Any, directory: Path, resume: bool) -> dict[str, Any]:
    """Run one stage in this process; returns what it took, and what its call says of it.

    An interrupted attempt whose state cannot be read is begun anew.
    """
    ledger, start = Ledger(), time.perf_counter()
    with ledger.phase("stage"):
        try:
            said = _call(call, config, directory, resume)
        except CheckpointError as error:
            if not resume:
                raise
            say(f"starting anew: {error}")
            remove_working(directory)
            said = _call(call, config, directory, False)
    measured = {"seconds": time.perf_counter() - start, "peak_bytes": ledger.peak_bytes["stage"]}
    return {**measured, **(said or {})}


def _call(call: Call, config: Any, directory: Path, resume: bool) -> Mapping[str, Any] | None:
    if not isinstance(call, Stage):
        found: Mapping[str, Any] | None = call(config, directory, resume)
        return found
    call.run(config, directory, how=How(overwrite="overwrite" in call.takes, resume=resume and "resume" in call.takes))
    return None


def remove_working(directory: Path) -> None:
    """Put away what an interrupted attempt has left."""
    shutil.rmtree(directory.with_name(directory.name + ".partial"), ignore_errors=True)
