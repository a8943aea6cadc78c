"""One call in a process of its own, so that peak memory is the call's own and a crash costs one run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.placement import Asked, asked, asking
from limbeck.runner.outcome import Outcome, name_of


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a fresh process and hand back its result or its error.

    The processes are forked from a server that has imported the stages and run nothing, so they start quickly, own
    all the memory that they are charged for, and inherit no thread pool. They end with the process that called them,
    however that ends: who goes on after a kill finds nobody at work.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, asked(), function, arguments))
    with _without_main():
        process.start()
    theirs.close()
    try:
        outcome: Outcome = ours.recv()
    except EOFError:
        process.join()
        raise LimbeckError(
            f"{name_of(function)}: the process died (exit code {process.exitcode}); was memory short?"
        ) from None
    except BaseException:
        process.terminate()
        raise
    process.join()
    return outcome.unwrap()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """No child imports the caller's script: that would start all of it again where it has no `if __name__ ...`."""
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main).pop(name) for name in ("__spec__", "__file__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def _send(pipe: Connection, placement: Asked, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    threading.Thread(target=_end_with_caller, args=(pipe,), daemon=True).start()
    with asking(*placement):
        pipe.send(Outcome.of(function, *arguments))


def _end_with_caller(pipe: Connection) -> None:
    """Wait for the other end, which never sends anything, to be closed."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv()
    os._exit(1)
