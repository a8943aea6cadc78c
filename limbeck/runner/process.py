"""One call in a process of its own, so that peak memory is the call's own and a crash costs one run."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from limbeck.errors import LimbeckError


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a fresh process and hand back its result or its error.

    The processes are forked from a server that has imported the stages and run nothing, so they start quickly, own
    all the memory that they are charged for, and inherit no thread pool.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        kind, value = ours.recv()
    except EOFError:
        process.join()
        raise LimbeckError(
            f"{function.__name__.strip('_')}: the process died (exit code {process.exitcode}); was memory short?"
        ) from None
    except BaseException:
        process.terminate()
        raise
    process.join()
    if kind == "error":
        raise value
    return value


def _call(pipe: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        pipe.send(("value", function(*arguments)))
    except (LimbeckError, OSError) as error:
        pipe.send(("error", error))
    except Exception as error:  # anything else is a defect: its stack is shown here, where it happened
        traceback.print_exc()
        pipe.send(("error", LimbeckError(f"{function.__name__.strip('_')} failed: {error!r}")))
