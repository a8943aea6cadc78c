"""Well-behaved clients beside hostile ones, and requests made at random from the server's own description."""

import random
import socket
import threading
import time

import httpx
import numpy as np
import pytest
from limbeck_server import RunningServer
from made_tokenizers import CHATML
from test_serve_faults import run_generated
from written_models import save_exportable

GOOD = [
    ("/v1/completions", {"prompt": "the her at", "max_tokens": 8, "seed": 1}),
    ("/v1/score", {"query": "the her at " * 8, "items": ["a", "b", "c"], "labels": ["a", "b"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the her"}], "max_tokens": 8, "seed": 1}),
    ("/v2/rerank", {"query": "at", "documents": ["the", "her"], "labels": ["a", "b"]}),
]
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 40}


def heavy_schema(number):
    schema = {"type": "integer", "multipleOf": 30_000_001 + 2 * number}
    return {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}


HOSTILE = [
    lambda n: ("/v1/chat/completions", heavy_schema(n)),
    lambda n: ("/v1/chat/completions", {**CHAT, "structured_outputs": {"regex": "(.{1,1000}){1,1000}"}}),
    lambda n: ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object", "schema": {"$ref": "#"}}}),
    lambda n: ("/v1/completions", {"prompt": [{}] * 150_000}),
    lambda n: ("/v2/rerank", {"query": "a", "documents": [1] * 250_000}),
    lambda n: ("/v1/completions", {"prompt": "word " * 100_000}),
    lambda n: ("/v1/score", {"query": f"{n} " * 60, "items": ["the her at " * 9] * 900, "labels": ["a", "b"]}),
    lambda n: ("/v1/completions", {"prompt": "a", "n": 64, "logprobs": 20, "max_tokens": 50, "ignore_eos": True}),
    lambda n: ("/v1/completions", {"prompt": "a", "temperature": 1e-40, "max_tokens": 9}),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_exportable(directory, max_position_embeddings=512)
    (directory / "chat_template.jinja").write_text(CHATML)
    with RunningServer(str(directory), limits={"form_seconds": 0.5, "seconds": 60}) as running:
        yield running


class Crowd:
    """Clients of both kinds for a while."""

    def __init__(self, server):
        self._server, self._over = server, threading.Event()
        self.seconds, self.statuses, self.pauses = [], [], []

    def run(self, good, hostile, seconds):
        targets = [(self._ask, number) for number in range(good)] + [(self._harm, number) for number in range(hostile)]
        threads = [threading.Thread(target=target, args=(number,)) for target, number in targets]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        self._over.set()
        for thread in threads:
            thread.join(90)
        return self

    def _ask(self, number):
        with httpx.Client(timeout=90) as client:
            while not self._over.is_set():
                path, body = GOOD[number % len(GOOD)]
                start = time.monotonic()
                self.statuses.append(client.post(self._server.url + path, json=body).status_code)
                self.seconds.append(time.monotonic() - start)
                self._over.wait(1.0)

    def _harm(self, number):
        chance = random.Random(number)
        while not self._over.is_set():
            if chance.random() < 0.2:
                self._hold_open()
                continue
            path, body = chance.choice(HOSTILE)(chance.randrange(1000))
            try:  # half of them leave before they are answered
                timeout = chance.choice([0.3, 90])
                status = httpx.post(self._server.url + path, json=body, timeout=timeout).status_code
                assert status < 500 or status == 503
            except httpx.TransportError:
                pass

    def _hold_open(self):
        address = ("127.0.0.1", int(self._server.url.rsplit(":", 1)[1]))
        held = [socket.create_connection(address) for _ in range(10)]
        self._over.wait(0.2)
        for connection in held:
            connection.close()


def assert_nothing_is_left(server):
    end = time.monotonic() + 60
    while server.gate.under_way or server.service.dispatcher._tickets or server.service.worker._long:
        assert time.monotonic() < end, "something is left"
        time.sleep(0.05)
    assert server.service.generator.running == 0 and not server.service.forms._answers


def test_a_few_good_clients_beside_hostile_ones(server):
    crowd = Crowd(server).run(good=4, hostile=3, seconds=3)
    assert set(crowd.statuses) == {200}
    assert_nothing_is_left(server)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_good_clients_are_as_fast_beside_hostile_ones(server):
    alone = Crowd(server).run(good=64, hostile=0, seconds=30)
    together = Crowd(server).run(good=64, hostile=8, seconds=60)
    assert set(alone.statuses) == set(together.statuses) == {200}
    p99 = [float(np.quantile(crowd.seconds, 0.99)) for crowd in (alone, together)]
    print(f"p99 alone {p99[0]:.2f} s, beside hostile clients {p99[1]:.2f} s")
    assert p99[1] <= 2 * p99[0] + 0.5
    assert_nothing_is_left(server)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_thousand_requests_from_the_description(server):
    assert run_generated(server, 20_000) > 5000
    assert_nothing_is_left(server)
