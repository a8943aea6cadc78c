"""Several servers of one model behind one address: who takes what, and what happens when one ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from limbeck_server import RunningServer

from limbeck.config import build
from limbeck.errors import ConfigError
from limbeck.serve.config import ServeConfig
from limbeck.serve.routing import PIECE_CHARACTERS, SLACK, Routes, beginning, pieces

LONG = "a long beginning that many requests share " * 20


def test_what_begins_alike_stays_together():
    routes = Routes(4)
    first = routes.choose(LONG + "one", range(4))
    routes.under_way[first] = 2
    assert routes.choose(LONG + "two", range(4)) == first
    other = routes.choose("something else " * 30, range(4))
    assert other != first
    routes.under_way[first] = SLACK + 1
    assert routes.choose(LONG + "three", range(4)) != first  # too busy; now it is known there as well
    moved = routes.choose(LONG, range(4))
    routes.under_way[first] = 0
    assert routes.choose(LONG, range(4)) == moved
    assert routes.choose(LONG, [one for one in range(4) if one != moved]) != moved


def test_pieces_are_keys_of_whole_beginnings():
    text = "x" * PIECE_CHARACTERS
    assert pieces(text + "a")[0] == pieces(text + "b")[0]
    assert pieces("y" + text[1:] + text)[1] != pieces(text + text)[1]
    assert len(pieces("short")) == 1 and pieces("short") != pieces("shorter")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"query": "q", "items": ["a"]}, "q"),
        ({"prompt": ["p", "other"]}, "p"),
        ({"prompt": [[1, 2], [3]]}, "1 2"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "m"}]}]}, "user\nm\n"),
        ({"input": "i"}, "i"),
        ({"queries": ["q"], "documents": ["d"]}, "q"),
        ({"prompt": {"odd": 1}}, ""),
        (None, ""),
        ([], ""),
    ],
)
def test_where_prompts_stand(body, text):
    assert beginning(body) == text


def test_other_engines_have_replicas_of_their_own():
    with pytest.raises(ConfigError, match="replicas of its own"):
        build(ServeConfig, {"model": "tiny-student", "engine": "vllm", "replicas": 2})


@pytest.fixture(scope="module")
def routed():
    """Two replicas, from the command line."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "limbeck", "serve", "tiny-student", "--replicas", "2", "--port", str(port)]
    command += ["--api-key", "secret", "--limits.grace-seconds", "10"]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        url = f"http://127.0.0.1:{port}"
        client = httpx.Client(base_url=url, headers={"authorization": "Bearer secret"}, timeout=60)
        end = time.monotonic() + 200
        while True:
            try:
                client.get("/health")
                break
            except httpx.TransportError:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.2)
        yield client
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def by_replica(client, name):
    text = client.get("/metrics").text
    found = re.findall(rf'^{name}{{[^}}]*replica="(\d)"[^}}]*}} ([\d.e+]+)$', text, re.MULTILINE)
    totals = [0.0, 0.0]
    for replica, value in found:
        totals[int(replica)] += float(value)
    return totals


@pytest.mark.slow
def test_answers_are_those_of_one_server(routed):
    body = {"prompt": "7a+4", "max_tokens": 12, "temperature": 0, "logprobs": 1}
    with RunningServer() as alone:
        expected = alone.post("/v1/completions", body).json()["choices"]
    assert routed.post("/v1/completions", json=body).json()["choices"] == expected
    with routed.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 5
    assert routed.post("/v1/completions", json={"prompt": 5}).status_code == 422
    assert routed.post("/v1/completions", json=body, headers={"authorization": "Bearer no"}).status_code == 401
    assert routed.post("/v1/completions", json=body, headers={"host": "attacker.test"}).status_code == 403
    assert httpx.get(str(routed.base_url) + "/metrics").status_code == 401


@pytest.mark.slow
def test_prefixes_stay_together_and_load_is_spread(routed):
    def ask(number):
        query = f"{number % 6}a+4b*3c-8d+9" * 20
        items = {"items": ["1", "2"], "label_token_ids": [16, 17]}
        return routed.post("/v1/score", json={"query": query, **items}).status_code

    before = by_replica(routed, "vllm:prefix_cache_hits_total"), by_replica(routed, "limbeck:scored_items_total")
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(36))) == {200}
    hits = sum(by_replica(routed, "vllm:prefix_cache_hits_total")) - sum(before[0])
    assert hits >= 24 * 250  # of 36 requests of 260 tokens, those but the first of each query, or nearly so
    assert all(now > was for now, was in zip(by_replica(routed, "limbeck:scored_items_total"), before[1], strict=True))


@pytest.mark.slow
def test_a_pin_is_let_go_wherever_it_is(routed):
    pin = routed.post("/v1/prefill", json={"query": "12+3" * 40}).json()["id"]
    assert routed.delete(f"/v1/prefill/{pin}").json() == {"id": pin, "deleted": True}


@pytest.mark.slow
def test_a_replica_that_ends_is_started_again(routed):
    children = subprocess.run(["pgrep", "-f", "limbeck.serve.replica"], capture_output=True, text=True).stdout.split()
    mine = [child for child in children if is_below(int(child), os.getpid())]
    assert len(mine) == 2
    os.kill(int(mine[0]), signal.SIGKILL)
    end = time.monotonic() + 100
    body = {"prompt": "12", "max_tokens": 1}
    statuses = set()
    while time.monotonic() < end:
        statuses.add(routed.post("/v1/completions", json=body).status_code)
        if 'replica="0"' in (text := routed.get("/metrics").text) and 'replica="1"' in text:
            break
        time.sleep(0.3)
    else:
        raise AssertionError("it did not come back")
    assert statuses <= {200, 503} and 200 in statuses


def is_below(process, ancestor):
    while process > 1:
        if process == ancestor:
            return True
        with open(f"/proc/{process}/stat") as file:
            process = int(file.read().rpartition(")")[2].split()[1])
    return False
