"""`limbeck serve --replicas N`: N servers of one model on this machine, and a router in front of them.

Each replica is a `limbeck serve` of its own on a free port of loopback, with its share of the threads. The router
admits requests as any server does (`Gate`), hands them on by their beginning (`Routes`) and passes answers through as
they come. A replica that ends is started again; what it had under way is answered with 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator

import httpx

from limbeck.config import to_dict
from limbeck.errors import LimbeckError
from limbeck.serve.config import ServeConfig
from limbeck.serve.gate import Denial, Message, Receive, Send, refuse
from limbeck.serve.routing import Routes, beginning_of

START_SECONDS = 600.0
PROGRAM = "limbeck.serve.replica"
RESTART_SECONDS = 2.0
PASSED_OVER = frozenset(
    {b"host", b"connection", b"content-length", b"transfer-encoding", b"origin", b"date", b"server"}
)
"""Headers that are of one connection, or that the router has checked."""


class Replica:
    """One of the servers."""

    def __init__(self, number: int, config: ServeConfig, threads: int) -> None:
        self.number = number
        self.url: str | None = None
        """None while it does not answer."""
        own = {
            "host": "127.0.0.1",
            "port": 0,
            "num_threads": threads,
            "replicas": 1,
            "allow_host": [],
            "allow_origin": [],
        }
        self._config = json.dumps(to_dict(config) | {"name": config.name or config.model} | own).encode()
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        """Keep it running; the first start raises what keeps it from starting."""
        is_first, pipe = True, asyncio.subprocess.PIPE
        while True:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                PROGRAM,
                stdin=pipe,
                stdout=pipe,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(self._config + b"\n")
            async for line in self._process.stdout:
                if b" at http://" in line:
                    self.url = line.split()[-1].decode()
                    is_first = False
                else:
                    sys.stderr.write(line.decode("utf-8", "replace"))
            self.url = None
            await self._process.wait()
            if is_first:
                raise LimbeckError(f"replica {self.number} ended with {self._process.returncode} before it answered.")
            await asyncio.sleep(RESTART_SECONDS)

    async def stop(self) -> None:
        """End it, with its grace."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        await process.wait()


class Router:
    """The application in front of the replicas, as plain ASGI."""

    def __init__(self, config: ServeConfig) -> None:
        threads = max(1, (config.num_threads or os.cpu_count() or 1) // config.replicas)
        self._limits = config.limits
        self._routes = Routes(config.replicas)
        self.replicas = [Replica(number, config, threads) for number in range(config.replicas)]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        body = (await receive()).get("body", b"")
        alive = [one.number for one in self.replicas if one.url is not None]
        if not alive:
            await refuse(send, Denial(503, "No replica answers now."))
        elif scope["path"] == "/metrics":
            await self._answer_metrics(scope, send)
        elif scope["method"] == "DELETE":
            for number in alive:  # whose the pin is, only its replica knows
                answer = await self._client.request("DELETE", self._url(number, scope), headers=_headers(scope))
            await _pass(answer, send)
        else:
            text = await asyncio.to_thread(beginning_of, body, self._limits.body_values)
            await self._hand_on(self._routes.choose(text, alive), scope, body, send)

    async def _hand_on(self, number: int, scope: Message, body: bytes, send: Send) -> None:
        self._routes.under_way[number] += 1
        has_begun = False
        try:
            stream = self._client.stream(
                scope["method"], self._url(number, scope), headers=_headers(scope), content=body or None
            )
            async with stream as answer:
                has_begun = True
                await _pass(answer, send)
        except httpx.TransportError:
            if has_begun:
                raise  # the connection is cut, as its answer was
            await refuse(send, Denial(503, f"Replica {number} ended; ask again."))
        finally:
            self._routes.under_way[number] -= 1

    async def _answer_metrics(self, scope: Message, send: Send) -> None:
        """All replicas' series, told apart by a label."""
        lines: list[str] = []
        for one in self.replicas:
            if one.url is None:
                continue
            answer = await self._client.get(self._url(one.number, scope), headers=_headers(scope))
            if answer.status_code != 200:
                await _pass(answer, send)
                return
            for line in answer.text.splitlines():
                named = line if line.startswith("#") else line.replace("{", f'{{replica="{one.number}",', 1)
                lines += [] if line.startswith("#") and named in lines else [named]
        content = "\n".join(sorted(lines, key=_family)).encode() + b"\n"
        headers = [(b"content-type", b"text/plain; version=0.0.4"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _url(self, number: int, scope: Message) -> str:
        query = scope["query_string"].decode("latin-1")
        return f"{self.replicas[number].url}{scope['raw_path'].decode('latin-1')}{'?' if query else ''}{query}"

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with self._running() as problem:
            if problem is not None:
                await send({"type": "lifespan.startup.failed", "message": problem})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[str | None]:
        """Replicas that answer; or why they do not."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)
        tasks = [asyncio.create_task(one.run()) for one in self.replicas]
        problem = None
        try:
            async with asyncio.timeout(START_SECONDS):
                while not all(one.url for one in self.replicas):
                    problem = next((str(task.exception()) for task in tasks if task.done()), None)
                    if problem is not None:
                        break
                    await asyncio.sleep(0.05)
            yield problem
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*(one.stop() for one in self.replicas))
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.aclose()


async def _pass(answer: httpx.Response, send: Send) -> None:
    """An answer, piece by piece as it comes."""
    headers = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() not in PASSED_OVER]
    await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
    if answer.is_stream_consumed:
        await send({"type": "http.response.body", "body": answer.content})
        return
    async for piece in answer.aiter_raw():
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _headers(scope: Message) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in scope["headers"] if name not in PASSED_OVER]
    return [(name, value) for name, value in kept if not name.startswith(b"sec-fetch-")]


def _family(line: str) -> tuple[str, int]:
    """Series of one name stand together, behind what is said of it."""
    words = line.replace("{", " ").split()
    name = words[2] if line.startswith("#") else words[0]
    for ending in ("_bucket", "_sum", "_count", "_created", "_total"):
        name = name.removesuffix(ending)
    return name, 0 if line.startswith("# HELP") else 1 if line.startswith("#") else 2
