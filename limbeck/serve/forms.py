"""Compiled forms: tried in a process apart, kept within a number of bytes, given up with the client that asked."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.engine import constraints
from limbeck.engine.budget import Budget
from limbeck.engine.constraints import Form, GrammarConstraint, Grammars
from limbeck.errors import ConfigError
from limbeck.serve.config import LimitsConfig
from limbeck.serve.errors import Invalid
from limbeck.serve.threads import Pool
from limbeck.serve.ticket import Refusal

AT_ONCE = 4
"""Forms that are tried at the same time; the next ones wait."""
SOURCE_CHARACTERS = 1 << 18
"""Longest form, as JSON."""
LINE_BYTES = 64 << 20
FORM_BYTES = 1 << 10
"""That any entry takes, one that says why a form cannot be had included."""


class Compiled(NamedTuple):
    """A form that can be used, or why it cannot."""

    matcher: Any
    size_bytes: int
    problem: str | None = None
    used_at: int = 0
    """By the budget's `now`."""


def source_of(form: Form) -> str:
    """A form as JSON, by which it is known again.

    Raises: Invalid for one that is too long, before it is written: that would keep every other thread waiting.
    """
    length, left = 0, [form.source]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
            length += sum(map(len, value))
        elif isinstance(value, list):
            left += value
        length += len(value) if isinstance(value, str) else 1
        if length > SOURCE_CHARACTERS:
            raise Invalid(f"{form.kind}: more than {SOURCE_CHARACTERS} characters, the server's limit.")
    return json.dumps(form, sort_keys=True)


class Forms:
    """Of one server. Lives on the event loop; `start` and `stop` are called on it."""

    def __init__(self, tokenizer: Any, vocab_size: int, limits: LimitsConfig, budget: Budget) -> None:
        self._limits, self._budget = limits, budget
        self._budget.join(self)
        self._kept: OrderedDict[bytes, Compiled] = OrderedDict()
        """By digest of the form, the one used last at the end."""
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._thread = Pool(1, "forms")
        self._starting: asyncio.Task[asyncio.subprocess.Process] | None = None
        self._reader: asyncio.Task[None] | None = None
        self.missing: str | None = None
        """Why this model can hold no form."""
        try:
            self._grammars = Grammars(tokenizer, vocab_size)
            # Made before the loop runs, since it takes long.
            first = {"tokenizer": tokenizer.backend_tokenizer.to_str(), "vocab": self._grammars.known}
            self._first = json.dumps(first).encode() + b"\n"
        except ConfigError as error:
            self.missing = str(error)

    def start(self) -> None:
        """Called on the loop."""
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def stop(self) -> None:
        """End the process."""
        self._thread.close()
        if self._starting is not None:
            process = await self._starting
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def constraint(self, compiled: Compiled, end_tokens: frozenset[int]) -> GrammarConstraint:
        """One for each text, since it keeps the text's state."""
        return self._grammars.constraint(compiled.matcher, end_tokens, compiled.size_bytes)

    async def compiled(self, form: Form, source: str, until: float) -> Compiled:
        """A form that can be used.

        Args:
          source: `source_of` it.
          until: when the request's time is over, of `time.monotonic`.
        Raises: Invalid for a form that cannot be had; Refusal when the time is over.
        """
        if self.missing is not None:
            raise Invalid(f"{form.kind}: {self.missing}", "response_format")
        key = hashlib.blake2b(source.encode(), digest_size=16).digest()
        found = self._kept.get(key)
        if found is None:
            try:
                async with asyncio.timeout(until - time.monotonic()), self._turn:
                    found = self._kept.get(key) or await self._made(form)
            except TimeoutError:
                raise Refusal(408, "The request's time was over before its form was compiled.") from None
        self._keep(key, found)
        if found.problem is not None:
            raise Invalid(f"{form.kind}: {found.problem}.", "response_format")
        return found

    async def _made(self, form: Form) -> Compiled:
        answer = await self._tried(form)
        if "error" in answer:
            return Compiled(None, FORM_BYTES, answer["error"])
        self._budget.check(answer["bytes"], f"{form.kind}: compiled it takes")
        try:
            matcher = await self._thread.run(lambda: self._grammars.compile(answer["grammar"]))
        except ConfigError as error:
            return Compiled(None, FORM_BYTES, str(error))
        return Compiled(matcher, FORM_BYTES + answer["bytes"])

    def _keep(self, key: bytes, form: Compiled) -> None:
        """Keep what was used now, if there is room for it."""
        with self._budget.lock:
            if key in self._kept or self._budget.take(form.size_bytes):
                self._kept[key] = form._replace(used_at=self._budget.now())
                self._kept.move_to_end(key)

    def oldest(self) -> int | None:
        """See `Keeper`."""
        return next(iter(self._kept.values())).used_at if self._kept else None

    def release_oldest(self) -> None:
        """See `Keeper`."""
        self._budget.give_back(self._kept.popitem(last=False)[1].size_bytes)

    async def _tried(self, form: Form) -> dict[str, Any]:
        """What the process apart says of a form; cancelling ends its work on it."""
        if self._starting is None or (self._starting.done() and self._starting.result().returncode is not None):
            self._starting = asyncio.create_task(self._started())
        process = await asyncio.shield(self._starting)  # others wait for it as well
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        bounds = {"bytes": self._limits.form_bytes, "seconds": self._limits.form_seconds}
        assert process.stdin is not None
        process.stdin.write(json.dumps({"id": number, **form._asdict(), **bounds}).encode() + b"\n")
        try:
            return await self._answers[number]
        finally:
            if self._answers.pop(number).cancelled():
                process.stdin.write(json.dumps({"cancel": number}).encode() + b"\n")

    async def _started(self) -> asyncio.subprocess.Process:
        """The process; started when it is first needed, and anew should it have ended."""
        pipe = asyncio.subprocess.PIPE
        program = Path(constraints.__file__).with_name("form_trial.py")
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(program), stdin=pipe, stdout=pipe, limit=LINE_BYTES
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(self._first)
        await process.stdout.readline()
        self._reader = asyncio.create_task(self._read(process))
        return process

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            answer = json.loads(line)
            waiting = self._answers.get(answer["id"])
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_result({"error": "the process that compiles forms has ended; ask again"})
