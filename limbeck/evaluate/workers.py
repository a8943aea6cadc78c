"""Answer checks in worker processes that can be killed: a check that hangs or crashes costs one item, not the run.

A worker is a fresh interpreter (not a fork: that would copy torch's threads and their locks) that imports one check
function and answers JSON lines over its pipes. The parent waits on all pipes at once; it needs neither threads nor
signals, so it works off the main thread. Unix only, like the pipes that it waits on.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from typing import IO, Any

from limbeck.errors import LimbeckError
from limbeck.evaluate.answers import Verdict

CHECKS = {
    "exact": ("limbeck.evaluate.compare", "check_exact"),
    "math": ("limbeck.evaluate.math_answers", "check_math"),
}
STARTUP_SECONDS = 300.0
"""A worker that has not imported its check by then is given up; long, because a loaded machine is no error."""
WORKER_BYTES = 4 * 2**30
"""Address space of a worker: a number with a billion digits ends in a MemoryError, not in a machine that swaps."""
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from limbeck.evaluate.workers import serve; "
    "serve(sys.argv[2], sys.argv[3], float(sys.argv[4]))"
)


class AnswerChecker:
    """A pool of workers for one kind of check; use it as a context manager.

    Args:
      check: which comparison.
      timeout_seconds: wall-clock time for one item; after it the worker is killed and the item is unknown.
      num_workers: processes.
    """

    def __init__(self, check: str = "exact", timeout_seconds: float = 10.0, num_workers: int = 2) -> None:
        self._check, self._timeout_seconds, self._num_workers = check, timeout_seconds, num_workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> AnswerChecker:
        self._workers = [_Worker(self._check, self._timeout_seconds) for _ in range(self._num_workers)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def verdicts(self, pairs: Iterable[tuple[Any, Any]], advance: Callable[[int], Any] | None = None) -> list[Verdict]:
        """The verdict of every (candidate, reference) pair, in order.

        A pair is unknown when its check raises, hangs, crashes or cannot be sent (it is not JSON).
        Raises: LimbeckError when a worker cannot start at all.
        """
        jobs = list(map(_encoded, pairs))
        verdicts = [Verdict.UNKNOWN] * len(jobs)
        waiting = deque((item, job) for item, job in enumerate(jobs) if job is not None)
        done = advance or (lambda count: None)
        done(len(jobs) - len(waiting))
        while self._give(waiting):
            for worker in self._events():
                item = worker.item
                reply = worker.receive() if worker.has_reply else None
                if item is not None:
                    verdicts[item] = Verdict.UNKNOWN if reply is None else Verdict(reply)
                    done(1)
                if reply is None:
                    self._replace(worker)
        return verdicts

    def _give(self, waiting: deque[tuple[int, bytes]]) -> bool:
        """Give a job to every worker that has none; returns whether any job is left or under way."""
        is_any = bool(waiting)
        for worker in self._workers:
            if worker.is_ready and worker.item is None and waiting:
                worker.give(*waiting.popleft())
            is_any = is_any or worker.item is not None
        return is_any

    def _events(self) -> list[_Worker]:
        """Wait for the next reply, end or deadline; the workers concerned, with `has_reply` set."""
        busy = [worker for worker in self._workers if worker.item is not None or not worker.is_ready]
        left = min(worker.deadline for worker in busy) - time.monotonic()
        readable = wait([worker.replies.fileno() for worker in busy], max(0.0, left))
        for worker in busy:
            worker.has_reply = worker.replies.fileno() in readable
        return [worker for worker in busy if worker.has_reply or worker.deadline <= time.monotonic()]

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        if not worker.is_ready:
            raise LimbeckError(f"the answer check {self._check!r} does not start: {worker.last_words}.")
        self._workers[self._workers.index(worker)] = _Worker(self._check, self._timeout_seconds)


class _Worker:
    """One process, what it is doing, and until when it may."""

    def __init__(self, check: str, timeout_seconds: float) -> None:
        self.last_words = ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), *CHECKS[check], str(timeout_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._timeout_seconds = timeout_seconds
        self.is_ready, self.has_reply = False, False
        self.item: int | None = None
        self.deadline = time.monotonic() + STARTUP_SECONDS

    @property
    def replies(self) -> IO[bytes]:
        """The pipe that it answers on."""
        assert self._process.stdout is not None
        return self._process.stdout

    def give(self, item: int, job: bytes) -> None:
        """Send one job. A worker that is dead by now is seen as such by the next read."""
        assert self._process.stdin is not None
        self.item, self.deadline = item, time.monotonic() + self._timeout_seconds
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(job)
            self._process.stdin.flush()

    def receive(self) -> str | None:
        """The verdict; an empty text for the sign of readiness; None when the process has ended."""
        line = self.replies.readline().decode().strip()
        if not line:
            return None
        if not self.is_ready:
            self.is_ready = True
            return ""
        self.item = None
        return line

    def kill(self) -> None:
        """End the process, whatever it is doing, and keep the last line that it wrote to standard error."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            lines = self._process.communicate()[1].decode(errors="replace").strip().splitlines()
            self.last_words = lines[-1] if lines else "it ended without a word"


def serve(module: str, function: str, timeout_seconds: float) -> None:
    """Answer jobs from standard input with the named check until it closes. Runs in the worker."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # What the check or its libraries print is no reply.
    check = getattr(importlib.import_module(module), function)
    logging.disable(logging.CRITICAL)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)  # Nobody reads this pipe from here on; a full one would block the check.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    print("ready", file=replies)
    for line in sys.stdin:
        # Should the parent be killed during a check that hangs, nobody else would end this process.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_seconds + 10)
        try:
            verdict = check(*json.loads(line))
        except Exception:
            verdict = Verdict.UNKNOWN
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(verdict.value, file=replies)


def _encoded(pair: tuple[Any, Any]) -> bytes | None:
    try:
        return json.dumps(list(pair)).encode() + b"\n"
    except (TypeError, ValueError, RecursionError):
        return None
