"""The load generator: its arrivals, its clock, its figures; and a whole run against a server."""

import asyncio
import json
import time

import numpy as np
import pytest
from limbeck_server import RunningServer

from limbeck.config import build
from limbeck.errors import ConfigError
from limbeck.serve import bench
from limbeck.serve.bench_report import _series, write_plot
from limbeck.serve.load import Outcome, Shot, arrivals, fire, summarise


def test_arrivals_are_a_poisson_process():
    times = arrivals(50.0, 100.0, seed=1)
    gaps = np.diff(times)
    assert times == sorted(times) and times[0] >= 0 and times[-1] < 100
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as exponential gaps have it
    assert times == arrivals(50.0, 100.0, seed=1) != arrivals(50.0, 100.0, seed=2)


def test_a_load_never_ends_before_its_time():
    assert arrivals(0.5, 1000.0, seed=0)[-1] > 980


def test_figures():
    outcomes = [Outcome(200, 10, 0.1 * n) for n in range(1, 11)] + [Outcome(429, 10, 0.01)]
    found = summarise(outcomes, slo_seconds=0.55)
    assert (found["requests"], found["failed"]) == (11, 1)
    assert found["within_slo"] == pytest.approx(5 / 11)
    assert found["ttft_p50_seconds"] == pytest.approx(0.55) and found["tpot_p50_seconds"] is None
    texts = summarise([Outcome(200, 0, 1.1, 0.1, tokens=11)], slo_seconds=1.0)
    assert texts["ttft_p99_seconds"] == 0.1 and texts["tpot_p99_seconds"] == pytest.approx(0.1)


def test_a_server_that_does_not_answer_is_a_failure_and_no_crash():
    (outcome,) = asyncio.run(fire("http://127.0.0.1:9", [0.0], lambda _: Shot("/v1/score", {}, 1), {}))
    assert outcome.status == 0


def test_latency_counts_from_when_a_request_was_due():
    """A client that is held up itself must not make the server look fast."""
    with RunningServer() as server:
        body = {"query": "1", "items": ["2"], "label_token_ids": [16]}

        def make(number):
            if number == 1:
                time.sleep(0.5)  # made after the clock has started
            return Shot("/v1/score", body, 1)

        outcomes = asyncio.run(fire(server.url, [0.0, 0.01], make, {}))
    assert all(outcome.status == 200 and outcome.whole_seconds > 0.45 for outcome in outcomes)


def test_a_whole_run(tmp_path):
    with RunningServer() as server:
        config = {"url": server.url, "score_loads": [10], "text_loads": [10], "seconds": 0.5, "prefix_tokens": 65}
        found = bench.run(build(bench.BenchServeConfig, config | {"items": 3, "new_tokens": 4}), tmp_path / "out")
        cache = server.service.scorer.cache_stats()
    tree = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert tree["rows"] == found.manifest["metrics"]["rows"] and len(tree["rows"]) == 4
    assert all(row["failed"] == 0 and row["requests"] > 0 for row in tree["rows"])
    assert {row["prefixes"] for row in tree["rows"]} == {"cold", "hot"}
    assert tree["rows"][0]["items_per_second"] > 0 and tree["rows"][-1]["tpot_p50_seconds"] > 0
    assert cache.hit_tokens > 0, "hot prefixes are found"
    assert (tmp_path / "out" / "serve.png").read_bytes().startswith(b"\x89PNG")
    assert "| 1 | score | hot | 10 |" in (tmp_path / "out" / "serve.md").read_text()


def test_loads_are_checked():
    with pytest.raises(ConfigError, match="above 0"):
        build(bench.BenchServeConfig, {"score_loads": [0]})


def test_replicas_are_of_a_server_that_is_started_here():
    for fields in ({"url": "http://localhost:1", "replicas": [2]}, {"replicas": [0]}, {"replicas": []}):
        with pytest.raises(ConfigError, match="replicas are 1 or more"):
            build(bench.BenchServeConfig, fields)


def test_numbers_of_replicas_are_told_apart(tmp_path):
    figures = {f"{name}_p{p}_seconds": 0.5 for name in ("ttft", "tpot") for p in (50, 95, 99)}
    rest = {"items_per_second_in_slo": 3.0, "requests_per_second": 1.0, "prefixes": "hot"}
    rows = [{"replicas": n, "workload": w, **figures, **rest} for n in (1, 4) for w in ("score", "text")]
    write_plot({"config": {"slo_seconds": 1.0}, "rows": rows}, tmp_path / "plot.png")
    assert [name for *_, name, _ in _series(rows, "text")] == ["hot x1", "hot x4"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
