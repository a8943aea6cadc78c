"""States that are written while the training goes on: a copy is taken, and a thread writes it.

One at a time: the next state waits for the one before it. A state that cannot be written (a full disk) is told, and the
run goes on; the states before it stay. A model in parts is written by all processes together, and waited for.
"""

from __future__ import annotations

import threading
from pathlib import Path

from safetensors import SafetensorError

from limbeck.distill.state import State, write_state
from limbeck.progress import say


class Saving:
    """The states of one run, in its working directory."""

    def __init__(self, directory: Path, keep: int) -> None:
        """`keep`: how many of the last ones stay."""
        self._directory, self._keep = directory, keep
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    def begin(self, state: State) -> None:
        """Write a state beside what follows; nothing of it may change any more."""
        self.finish()
        if state.in_parts:
            write_state(self._directory, state, self._keep)
            return
        self._thread = threading.Thread(target=self._write, args=(state,), name="saving")
        self._thread.start()

    def finish(self) -> str | None:
        """Wait for the state under way; returns why the last one was not written, None where it was."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._problem

    def _write(self, state: State) -> None:
        try:
            write_state(self._directory, state, self._keep)
            self._problem = None
        except (OSError, SafetensorError) as error:
            what = " ".join(str(error).split())[:200]
            self._problem = f"the state behind step {state.step} could not be written ({what})"
            say(f"warning: {self._directory}: {self._problem}; the run goes on, with the states from before.")
