"""Compiles forms where nothing else can be harmed: a program of its own, run by its path, with one fork a form.

A form may take any amount of time and memory to compile, and llguidance cannot be interrupted. So each is tried in a
process that the kernel bounds (address space, CPU seconds) and that is killed when its time is over or nobody waits
for it any more. What passes is then compiled by the engine, where it takes no more than it took here.

    in    one line of JSON each: {"tokenizer": ..., "vocab": ...} first, then {"id", "kind", "source", "bytes",
          "seconds"} or {"cancel": id}
    out   {"id", "grammar", "bytes"} or {"id", "error"}
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import selectors
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import llguidance

ONE_SPACE: Any = {"whitespace_flexible": True, "whitespace_pattern": "[ ]?"}
"""Between the parts of a JSON text; without a limit small models write spaces for ever."""
NICENESS = 10
Limits = llguidance.LLParserLimits


def grammar_of(kind: str, source: Any) -> str:
    """llguidance's grammar. Raises: ValueError."""
    matcher = llguidance.LLMatcher
    if kind == "json_schema":
        return matcher.grammar_from_json_schema(source, overrides=ONE_SPACE)
    if kind == "regex":
        return matcher.grammar_from_regex(source)
    # As one expression: alternatives of a grammar are limited to 2,000.
    return matcher.grammar_from_regex("|".join(re.sub(r"[\\.+*?()|\[\]{}^$/&#~-]", r"\\\g<0>", one) for one in source))


def problem_of(matcher: Any) -> str:
    """Why a matcher can write nothing, in a line; empty where it can."""
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    if matcher.is_error():
        return " ".join(str(matcher.get_error()).partition("<state>")[0].split()) or "it cannot be compiled"
    return "" if any(mask) or matcher.is_accepting() else "no text has this form"


def attempt(tokenizer: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Compile one form, in this process."""
    before = _resident_bytes()
    try:
        grammar = grammar_of(order["kind"], order["source"])
        problem = problem_of(llguidance.LLMatcher(tokenizer, grammar, log_level=0))
    except (ValueError, MemoryError, RecursionError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
    if problem:
        return {"id": order["id"], "error": problem[:500]}
    return {"id": order["id"], "grammar": grammar, "bytes": max(0, _resident_bytes() - before) + len(grammar)}


class Child(NamedTuple):
    """A form under way."""

    id: int
    process: int
    pipe: int
    until: float
    answer: bytearray


class Trials:
    """Forms under way, by their pipes; what a method returns are those that are over, and why."""

    def __init__(self, tokenizer: Any, selector: selectors.BaseSelector) -> None:
        self._tokenizer, self._selector = tokenizer, selector
        self.children: dict[int, Child] = {}

    def late(self) -> dict[int, str]:
        """Forms whose time is over."""
        now = time.monotonic()
        return {c.pipe: "it takes too long to compile" for c in self.children.values() if c.until <= now}

    def wait_seconds(self) -> float | None:
        """Until the next one's is."""
        return min((max(0.0, child.until - time.monotonic()) for child in self.children.values()), default=None)

    def hear(self, pipe: int) -> dict[int, str]:
        """Read what a form's process says."""
        data = os.read(pipe, 1 << 16)
        self.children[pipe].answer.extend(data)
        return {} if data else {pipe: "it takes too much memory or time to compile"}

    def obey(self, order: dict[str, Any]) -> dict[int, str]:
        """Begin a form, or give one up."""
        if "cancel" in order:
            return {child.pipe: "given up" for child in self.children.values() if child.id == order["cancel"]}
        self.begin(order)
        return {}

    def begin(self, order: dict[str, Any]) -> None:
        """Fork for a form."""
        ours, theirs = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(ours)
            _bound(order["bytes"], order["seconds"])
            with contextlib.suppress(BaseException), os.fdopen(theirs, "wb") as pipe:
                pipe.write(json.dumps(attempt(self._tokenizer, order)).encode())
            os._exit(0)
        os.close(theirs)
        self.children[ours] = Child(order["id"], process, ours, time.monotonic() + order["seconds"], bytearray())
        self._selector.register(ours, selectors.EVENT_READ)

    def end(self, pipe: int, error: str) -> dict[str, Any]:
        """The answer of a form that is over; of one that is not, `error`, and its process is killed."""
        child = self.children.pop(pipe)
        self._selector.unregister(pipe)
        os.close(pipe)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.process, signal.SIGKILL)
        os.waitpid(child.process, 0)
        try:
            return dict(json.loads(child.answer))
        except ValueError:
            return {"id": child.id, "error": error}


def serve() -> None:
    """Work off the lines of standard input until it ends."""
    first = json.loads(sys.stdin.buffer.readline())
    selector, held = selectors.DefaultSelector(), b""
    trials = Trials(llguidance.LLTokenizer(first["tokenizer"], n_vocab=first["vocab"]), selector)
    selector.register(0, selectors.EVENT_READ)
    _tell({"ready": True})
    while True:
        over = trials.late()
        for key, _ in () if over else selector.select(trials.wait_seconds()):
            if key.fd in trials.children:
                over |= trials.hear(key.fd)
                continue
            data = os.read(key.fd, 1 << 16)
            if not data:
                return
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                over |= trials.obey(json.loads(line))
        for pipe, error in over.items():
            _tell(trials.end(pipe, error))


def _bound(more_bytes: int, seconds: float) -> None:
    """Limits of this process, which was just forked."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    cpu = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    os.nice(NICENESS)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _tell(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; it ends with its standard input
    serve()
