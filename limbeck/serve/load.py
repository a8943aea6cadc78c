"""Open-loop load: requests leave at times drawn beforehand, whether or not earlier ones have come back.

A latency counts from the time at which the request was due, so that a client or a server that falls behind shows it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import numpy as np

PERCENTILES = (50, 95, 99)


class Shot(NamedTuple):
    """A request of the load."""

    path: str
    body: dict[str, Any]
    items: int
    """Items that it scores; 0 for one that generates."""


@dataclass(slots=True)
class Outcome:
    """What came of a request; seconds count from when it was due."""

    status: int
    items: int
    whole_seconds: float
    first_seconds: float | None = None
    """To the first token of a stream."""
    tokens: int = 0

    @property
    def token_seconds(self) -> float | None:
        """Mean time of a token behind the first one."""
        if self.first_seconds is None or self.tokens < 2:
            return None
        return (self.whole_seconds - self.first_seconds) / (self.tokens - 1)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process in [0, seconds)."""
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / rate, size=max(8, int(3 * rate * seconds) + 8)))
    return [float(time) for time in times if time < seconds]


async def fire(url: str, times: Sequence[float], make: Callable[[int], Shot], headers: dict[str, str]) -> list[Outcome]:
    """Send one request at each time and wait for all of them."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, headers=headers) as client:
        start = time.perf_counter()
        tasks = [asyncio.create_task(_one(client, start + at, make(number))) for number, at in enumerate(times)]
        return list(await asyncio.gather(*tasks))


async def _one(client: httpx.AsyncClient, due: float, shot: Shot) -> Outcome:
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    try:
        if shot.body.get("stream"):
            return await _streamed(client, due, shot)
        answer = await client.post(shot.path, json=shot.body)
        return Outcome(answer.status_code, shot.items, time.perf_counter() - due)
    except httpx.TransportError:
        return Outcome(0, shot.items, time.perf_counter() - due)


async def _streamed(client: httpx.AsyncClient, due: float, shot: Shot) -> Outcome:
    outcome = Outcome(0, shot.items, 0.0)
    async with client.stream("POST", shot.path, json=shot.body) as answer:
        outcome.status = answer.status_code
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                outcome.status = int(event["error"].get("code") or 500)
            if event.get("choices"):
                outcome.whole_seconds = time.perf_counter() - due
                outcome.first_seconds = outcome.first_seconds or outcome.whole_seconds
            if event.get("usage"):
                outcome.tokens = event["usage"]["completion_tokens"]
    return outcome


def summarise(outcomes: Sequence[Outcome], slo_seconds: float) -> dict[str, Any]:
    """Figures of a load: percentiles, rates, and what was done within the limit `slo_seconds`.

    For requests that score, the time to the first token is that of the whole answer. Rates are over the time from the
    first request being due to the last answer.
    """
    good = [outcome for outcome in outcomes if outcome.status == 200]
    first = [outcome.first_seconds or outcome.whole_seconds for outcome in good]
    each = [outcome.token_seconds for outcome in good if outcome.token_seconds is not None]
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "within_slo": sum(seconds <= slo_seconds for seconds in first) / max(1, len(outcomes)),
        **{f"ttft_p{p}_seconds": _percentile(first, p) for p in PERCENTILES},
        **{f"tpot_p{p}_seconds": _percentile(each, p) for p in PERCENTILES},
    }


def _percentile(values: Sequence[float], percent: int) -> float | None:
    """Linear between neighbours; None of nothing."""
    return float(np.percentile(values, percent)) if values else None
