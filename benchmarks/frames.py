"""How many functions of limbeck stand between a user's call and the formula, counted by a profiler.

A frame is a function under `limbeck/` that is on the stack when the formula is entered; the formula itself is not
counted. Other libraries' functions are not, and neither are generators and context managers, which have left the stack
by then. The largest number over all calls of the formula is told. Three routes on the built-in models:

    distill_frames   `limbeck.distill` to the divergence (bound: 8)
    solver_frames    the walk over the layers of `limbeck.prune` to the solver of one layer (bound: 6)
    score_frames     POST /v1/score to the attention of the scorer, on the event loop up to the hand-over and on the
                     engine's thread from there

    python benchmarks/frames.py [--quick]        both do the same, in seconds
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import httpx
from _process import markdown

import limbeck
from limbeck.compress.prune import wanda
from limbeck.config import build
from limbeck.distill.divergence import forward_kl
from limbeck.engine.attention import attend
from limbeck.serve.app import make_app
from limbeck.serve.config import ServeConfig
from limbeck.serve.gate import Gate
from limbeck.serve.server import Server, bind
from limbeck.serve.service import Service
from limbeck.serve.worker import Worker

PACKAGE = str(Path(limbeck.__file__).parent)
Route = list[str]
"""Functions, outermost first."""


@contextmanager
def watched(*formulas: Callable[..., Any]) -> Iterator[dict[CodeType, Route]]:
    """The longest way on which each of the formulas was entered within the block, on any thread that began in it."""
    found: dict[CodeType, Route] = {}
    codes = {formula.__code__ for formula in formulas}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in codes:
            route = route_to(frame)
            if len(route) > len(found.get(frame.f_code, [])):
                found[frame.f_code] = route

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def route_to(frame: FrameType) -> Route:
    """The functions of limbeck below `frame` on the stack."""
    route, caller = [], frame.f_back
    while caller is not None:
        if caller.f_code.co_filename.startswith(PACKAGE):
            file = Path(caller.f_code.co_filename).relative_to(PACKAGE)
            route.append(f"{file.with_suffix('').as_posix()}.{caller.f_code.co_qualname}")
        caller = caller.f_back
    return route[::-1]


def distillation(directory: Path) -> Route:
    """One step with a live teacher."""
    traces = {"source": "builtin:chain", "num_traces": 4}
    with watched(forward_kl) as found:
        limbeck.distill(
            "tiny-student",
            teacher="tiny-teacher",
            traces=traces,
            num_validation=0,
            max_steps=1,
            out=directory / "student",
        )
    return found[forward_kl.__code__]


def pruning(directory: Path) -> Route:
    """Half of the weights of every layer, by wanda; from the walk on."""
    traces = {"source": "builtin:chain", "num_traces": 8}
    calibration = {"traces": traces, "sequences": 2, "sequence_length_tokens": 64}
    with watched(wanda.solve) as found:
        limbeck.prune(
            "tiny-student",
            method="wanda",
            calibration=calibration,
            gate={"sequences": 0},
            out=directory / "pruned",
        )
    route = found[wanda.solve.__code__]
    return route[next(i for i, name in enumerate(route) if name.startswith("compress/walk.")) :]


def scoring(_: Path) -> Route:
    """One candidate over HTTP: the way to the hand-over, then the engine's thread."""
    with watched(Worker.submit, attend) as found, server("tiny-student") as url:
        found.clear()  # the scorer has measured its costs
        body = {"query": "1 + 1 =", "items": [" 2"], "label_token_ids": [5, 6]}
        httpx.post(f"{url}/v1/score", json=body, timeout=60).raise_for_status()
    return [*found[Worker.submit.__code__], f"serve/worker.{Worker.submit.__qualname__}", *found[attend.__code__]]


@contextmanager
def server(model: str) -> Iterator[str]:
    """A server in a thread of this process, and its address."""
    config = build(ServeConfig, {"model": model, "port": 0})
    service = Service(config)
    running = Server(Gate(make_app(service), config), config.limits, lambda: service.dispatcher.give_up())
    socket = bind(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        running.close()
        thread.join()


ROUTES = {"distill_frames": distillation, "solver_frames": pruning, "score_frames": scoring}


def main() -> None:
    """Count, print the routes and, as the last line, the numbers as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same")
    parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        routes = {name: route(Path(directory)) for name, route in ROUTES.items()}
    rows = [[name, str(len(route)), "<br>".join(route)] for name, route in routes.items()]
    print(markdown(["route", "frames", "functions, outermost first"], rows))
    print(json.dumps({name: len(route) for name, route in routes.items()}))


if __name__ == "__main__":
    main()
