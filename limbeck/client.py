"""A small client for model servers: JSON in, JSON out, with retries, back-off and bounded concurrency.

Nothing here opens a connection unless the user named a server. What may pass (a server that restarts, is busy or
limits the rate) is tried again; what cannot (an address that does not exist, a request that the server refuses) is one
clear error.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from limbeck.config import checked
from limbeck.errors import ConfigError, LimbeckError

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Answers that another try may change."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@checked
class ClientConfig:
    """How a server is asked."""

    concurrency: int = 8
    """Requests under way at once."""
    timeout_seconds: float = 600.0
    """Longest wait for one answer, in seconds; a long generation is one answer."""
    connect_seconds: float = 10.0
    """Longest wait for a connection, in seconds."""
    retries: int = 6
    """Tries after the first one, for errors that may pass."""
    backoff_seconds: float = 0.5
    """Wait before the first further try, in seconds; it doubles with every try, and a random half of it is left out."""
    max_backoff_seconds: float = 60.0
    """Longest wait between two tries, in seconds, also where the server asks for more."""
    api_key_variable: str | None = None
    """Environment variable that holds the server's key; the key itself is never written anywhere."""

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0:
            raise ConfigError(
                f"concurrency must be at least 1 and retries at least 0; found {self.concurrency} and {self.retries}"
            )
        for name in ("timeout_seconds", "connect_seconds", "backoff_seconds", "max_backoff_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be finite and above 0; found {getattr(self, name)}")


class Client:
    """JSON over HTTP to one server; safe to use from several threads.

    Args:
      url: the server's address; a path of `/v1` at its end is left out, since native calls stand beside it.
      config: limits and retries.
      key: sent as a bearer token when given.
      transport: in place of the network, for tests.
    """

    def __init__(
        self, url: str, config: ClientConfig, key: str | None = None, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.url, self.config = server_root(url), config
        self._random, self._closed = random.Random(), threading.Event()
        self._http = httpx.Client(
            timeout=httpx.Timeout(config.timeout_seconds, connect=config.connect_seconds),
            limits=httpx.Limits(max_connections=config.concurrency),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            transport=transport,
        )

    def close(self) -> None:
        """Close the connections; calls that wait for another try give up."""
        self._closed.set()
        self._http.close()

    def get(self, path: str) -> Any:
        """The JSON at `path`.

        Raises: LimbeckError, naming the address, the status and what to do.
        """
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any) -> Any:
        """The JSON that the server answers to `body`.

        Raises: LimbeckError, naming the address, the status and what to do.
        """
        return self._ask("POST", path, body)

    def has(self, path: str) -> Any | None:
        """The JSON object at `path`, or None when the server has nothing there."""
        try:
            answer = self._ask("GET", path, None)
        except ServerRefusal:
            return None
        return answer if isinstance(answer, dict) else None

    def only_model(self) -> str:
        """The name of the only model that the server lists.

        Raises: LimbeckError when it lists none or several.
        """
        answer = self.get("/v1/models")
        names = [str(entry["id"]) for entry in answer.get("data", [])] if isinstance(answer, dict) else []
        if len(names) != 1:
            raise LimbeckError(
                f"{self.url}: serves {', '.join(names) or 'no model'}; name one of them as server_model."
            )
        return names[0]

    def _ask(self, method: str, path: str, body: Any) -> Any:
        address = self.url + path
        for attempt in range(self.config.retries + 1):
            wait: float | None = None
            try:
                response = self._http.request(method, address, json=body)
            except httpx.InvalidURL as error:
                raise ConfigError(f"{address}: not an address ({error}); expected http://HOST:PORT.") from error
            except httpx.TransportError as error:
                problem = f"no answer ({type(error).__name__}: {_short(str(error))})"
            else:
                if response.is_success:
                    return _json(response, address)
                problem = f"status {response.status_code} ({_short(response.text)})"
                if response.status_code not in RETRIED_STATUS:
                    raise ServerRefusal(f"{address}: {problem}. {_advice(response.status_code)}")
                wait = retry_after_seconds(response.headers.get("Retry-After"))
            if attempt < self.config.retries and self._closed.wait(self._pause(attempt, wait)):
                break
        raise LimbeckError(
            f"{address}: {problem}, {self.config.retries + 1} times. Check that the server runs and is reachable; then "
            "start again, finished work is kept."
        )

    def _pause(self, attempt: int, asked: float | None) -> float:
        longest = self.config.max_backoff_seconds
        if asked is not None:
            return min(asked, longest)
        return min(longest, self.config.backoff_seconds * 2**attempt) * self._random.uniform(0.5, 1.0)


class ServerRefusal(LimbeckError):
    """The server answered that it will not do this, and will not later either."""


def map_concurrently(
    function: Callable[[Item], Result], items: Iterable[Item], concurrency: int
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) in the order of the items, with at most `concurrency` calls under way.

    Items are taken only as calls end, so that an interruption costs at most that many of them. Before an error is
    raised, later items that are done come first.
    """
    queue: deque[tuple[Item, Future[Result]]] = deque()
    pending = iter(items)
    pool = ThreadPoolExecutor(concurrency)
    try:
        while True:
            while len(queue) < concurrency and (item := next(pending, _END)) is not _END:
                queue.append((item, pool.submit(function, item)))
            if not queue:
                return
            first, future = queue.popleft()
            if future.exception() is not None:
                # What other calls have finished by now is handed on before the error ends the round.
                ready = [pair for pair in queue if pair[1].done() and pair[1].exception() is None]
                yield from ((item, done.result()) for item, done in ready)
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_END: Any = object()


def server_root(url: str) -> str:
    """The address without a slash or `/v1` at its end.

    Raises: ConfigError when it is no http(s) address.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"server: {url!r} is no address; expected http://HOST:PORT or https://HOST.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def api_key(config: ClientConfig) -> str | None:
    """The key in the environment variable that the config names; None when it names none.

    Raises: ConfigError when the variable is not set.
    """
    if config.api_key_variable is None:
        return None
    key = os.environ.get(config.api_key_variable)
    if not key:
        raise ConfigError(f"api_key_variable: the environment has no {config.api_key_variable}; set it to the key.")
    return key


def retry_after_seconds(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or as a date; None without a usable one."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _json(response: httpx.Response, address: str) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise LimbeckError(
            f"{address}: the answer is no JSON ({_short(response.text)}); is this the address of a model server?"
        ) from error


def _advice(status: int) -> str:
    if status in (401, 403):
        return "Put the server's key into an environment variable and name it in api_key_variable."
    if status in (404, 405):
        return "Name the address of the server alone (http://HOST:PORT), and its kind in dialect."
    return "Mend the request: a model name that the server knows, a top_n and a length that it allows."


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."
