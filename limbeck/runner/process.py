"""One call in a process of its own, so that peak memory is the call's own and a crash costs one run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.runner.outcome import Outcome, name_of


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a fresh process and hand back its result or its error.

    The processes are forked from a server that has imported the stages and run nothing, so they start quickly, own
    all the memory that they are charged for, and inherit no thread pool.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, arguments))
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


def _send(pipe: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    pipe.send(Outcome.of(function, *arguments))
