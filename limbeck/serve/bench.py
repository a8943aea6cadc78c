"""`limbeck bench serve`: latency and throughput of a server under Poisson load, with known and unknown prefixes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

from limbeck.checkpoint import Checkpoint, output_directory, versions, write_json, write_manifest
from limbeck.config import checked, to_dict
from limbeck.engine.weights import Precision
from limbeck.errors import ConfigError
from limbeck.progress import console
from limbeck.serve.bench_report import write_page, write_plot
from limbeck.serve.load import Outcome, Shot, arrivals, fire, summarise
from limbeck.stage import How

Prefixes = Literal["cold", "hot"]
WORDS = (
    "The member has read about trains, old houses, weather in the mountains, the price of bread and how to mend a "
    "window; once a week she looks for a film with music, rarely for a game, and never for anything with spiders."
)
START_SECONDS = 300.0


@checked
class BenchServeConfig:
    """What is asked of which server, and how fast."""

    model: str = "smollm2-135m"
    """Served here for the time of the benchmark, unless a url is given."""
    url: str | None = None
    """A server that runs already."""
    precision: Precision = "int8"
    """Of the server started here."""
    num_threads: int | None = None
    """Of the server started here; null leaves torch's choice."""
    replicas: tuple[int, ...] = (1,)
    """Of the server started here; several numbers, say 1 and 4, are compared."""
    score_loads: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)
    """Scoring requests a second, one load after the other."""
    text_loads: tuple[float, ...] = (0.5, 1.0, 2.0)
    """The same of requests that generate."""
    seconds: float = 15.0
    """How long requests of a load leave."""
    prefix_tokens: int = 256
    """Of the part in front: a member and a history, or the beginning of a prompt."""
    hot_prefixes: int = 4
    """With hot prefixes, requests begin with one of so many, all known to the cache."""
    items: int = 10
    """Candidates of a scoring request."""
    item_tokens: int = 24
    """Of each of them, and of what a prompt adds to its prefix."""
    new_tokens: int = 32
    """Of a generated text."""
    slo_seconds: float = 1.0
    """Most time to the first token, or to a scoring answer, for a request to count as served in time."""
    seed: int = 0
    """Of arrivals and prompts."""

    def __post_init__(self) -> None:
        loads = (*self.score_loads, *self.text_loads)
        if not loads or min(loads) <= 0 or min(self.seconds, self.slo_seconds) <= 0:
            raise ConfigError("bench serve: give one load or more; loads, seconds and slo_seconds above 0.")
        if not self.replicas or min(self.replicas) < 1 or (self.url is not None and self.replicas != (1,)):
            raise ConfigError("bench serve: replicas are 1 or more, of a server that is started here (without url).")


def run(config: BenchServeConfig, out: Path, *, how: How = How()) -> Checkpoint:
    """Measure all loads and write serve.json, serve.md and serve.png into `out`."""
    rows = [row for replicas in config.replicas for row in _rows(config, replicas)]
    tree = {
        "rows": rows,
        "config": to_dict(config),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": versions(),
    }
    best = max((row["items_per_second_in_slo"] for row in rows if row["workload"] == "score"), default=0.0)
    with output_directory(out, overwrite=how.overwrite) as working:
        write_json(working / "serve.json", tree)
        write_page(tree, working / "serve.md")
        write_plot(tree, working / "serve.png")
        metrics = {"items_per_second_in_slo": best, "rows": rows}
        write_manifest(working, stage="bench serve", config=config, inputs={}, metrics=metrics)
    return Checkpoint(out)


def _rows(config: BenchServeConfig, replicas: int) -> list[dict[str, Any]]:
    """All loads against a server with so many replicas."""
    with _server(config, replicas) as url:
        prompts = _Prompts(url, config)
        return [
            {"replicas": replicas, **_measure(url, config, prompts, workload, prefixes, rate)}
            for workload, loads in (("score", config.score_loads), ("text", config.text_loads))
            for prefixes in ("cold", "hot")
            for rate in loads
        ]


class _Prompts:
    """Random prompts of given lengths, from tokens of ordinary words."""

    def __init__(self, url: str, config: BenchServeConfig) -> None:
        answer = httpx.post(url + "/tokenize", json={"prompt": WORDS, "add_special_tokens": False}, headers=_headers())
        answer.raise_for_status()
        self._known = np.array(answer.json()["tokens"])
        self._config, self._random = config, np.random.default_rng(config.seed)
        self.hot = [self._ids(config.prefix_tokens) for _ in range(config.hot_prefixes)]

    def score(self, prefixes: Prefixes) -> Shot:
        """Items behind a prefix."""
        config = self._config
        body = {
            "query": self._prefix(prefixes),
            "items": [self._ids(config.item_tokens) for _ in range(config.items)],
            "label_token_ids": self._known[:2].tolist(),
            "apply_softmax": True,
        }
        return Shot("/v1/score", body, config.items)

    def text(self, prefixes: Prefixes) -> Shot:
        """A text behind a prompt."""
        body = {
            "prompt": self._prefix(prefixes) + self._ids(self._config.item_tokens),
            "max_tokens": self._config.new_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return Shot("/v1/completions", body, 0)

    def _prefix(self, prefixes: Prefixes) -> list[int]:
        if prefixes == "cold":
            return self._ids(self._config.prefix_tokens)
        return self.hot[self._random.integers(len(self.hot))]

    def _ids(self, count: int) -> list[int]:
        return self._random.choice(self._known, count).tolist()


def _measure(
    url: str, config: BenchServeConfig, prompts: _Prompts, workload: str, prefixes: Any, rate: float
) -> dict[str, Any]:
    make: Callable[[Prefixes], Shot] = prompts.score if workload == "score" else prompts.text
    warm = [make("cold"), *(make("hot") for _ in range(2 * config.hot_prefixes if prefixes == "hot" else 1))]
    asyncio.run(fire(url, [0.0] * len(warm), warm.__getitem__, _headers()))
    times = arrivals(rate, config.seconds, config.seed)
    shots = [make(prefixes) for _ in times]
    start = time.perf_counter()
    outcomes = asyncio.run(fire(url, times, shots.__getitem__, _headers()))
    wall = time.perf_counter() - start
    row = {
        "workload": workload,
        "prefixes": prefixes,
        "requests_per_second": rate,
        **summarise(outcomes, config.slo_seconds),
        **_rates(outcomes, wall, config.slo_seconds),
    }
    console.print(
        f"{workload} {prefixes} {rate:g}/s: p50 {row['ttft_p50_seconds'] or 0:.3f} s, p99 "
        f"{row['ttft_p99_seconds'] or 0:.3f} s, {row['within_slo']:.0%} in time, {row['failed']} failed"
    )
    return row


def _rates(outcomes: Sequence[Outcome], wall_seconds: float, slo_seconds: float) -> dict[str, float]:
    good = [outcome for outcome in outcomes if outcome.status == 200]
    in_time = [outcome for outcome in good if (outcome.first_seconds or outcome.whole_seconds) <= slo_seconds]
    return {
        "items_per_second": sum(outcome.items for outcome in good) / wall_seconds,
        "items_per_second_in_slo": sum(outcome.items for outcome in in_time) / wall_seconds,
        "tokens_per_second": sum(outcome.tokens for outcome in good) / wall_seconds,
    }


@contextlib.contextmanager
def _server(config: BenchServeConfig, replicas: int) -> Iterator[str]:
    """The address of a server that answers."""
    if config.url is not None:
        yield config.url.rstrip("/")
        return
    command = [sys.executable, "-m", "limbeck", "serve", config.model, "--port", "0", "--precision", config.precision]
    if replicas > 1:
        command += ["--replicas", str(replicas)]
    if config.num_threads is not None:
        command += ["--num-threads", str(config.num_threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if " at http" in line), "")
            if not line:
                raise ConfigError(f"bench serve: the server did not start: {' '.join(command)}")
            url = line.split()[-1]
            _wait_for(url)
            yield url
        finally:
            process.terminate()


def _wait_for(url: str) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url + "/health", headers=_headers()).status_code == 200:
                return
        time.sleep(0.1)
    raise ConfigError(f"bench serve: {url} does not answer.")


def _headers() -> dict[str, str]:
    key = os.environ.get("LIMBECK_API_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}
