"""Hostile traffic: generated, malformed, huge, slow and aborted requests; many clients; SIGTERM under load."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import hypothesis
import pytest
import schemathesis
from limbeck_server import RunningServer

MEMORY_BYTES = 8 << 20
LIMITS = {"body_bytes": 200_000, "body_seconds": 0.5, "new_tokens": 64, "default_tokens": 16, "pin_seconds": 1}
LIMITS |= {"memory_bytes": MEMORY_BYTES}


@pytest.fixture(scope="module")
def server():
    with RunningServer(limits=LIMITS) as running:
        yield running


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_nothing_is_left(server) -> None:
    """Whatever came, the engine holds no request, no pin and no block in use, and still answers."""
    worker, cache = server.service.worker, server.service.scorer.cache
    end = time.monotonic() + 30
    while server.gate.under_way or server.service.dispatcher._tickets or worker._pins or worker._jobs:
        assert time.monotonic() < end, "something is left"
        time.sleep(0.05)
    assert server.service.generator.running == 0
    assert all(block.users == 0 for block in cache._blocks.values())
    assert server.service.budget.used_bytes == cache.stats().used_bytes <= MEMORY_BYTES
    good = server.post("/v1/score", {"query": "1", "items": ["2"], "label_token_ids": [16]})
    assert good.status_code == 200


def run_generated(server, count: int) -> int:
    """Requests that schemathesis makes from the server's own description; returns how many were answered."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    answered = 0
    for operation in operations:
        cases = operation.as_strategy()

        @hypothesis.given(case=cases)
        @hypothesis.settings(
            max_examples=max(1, count // len(operations)),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def one(case):
            nonlocal answered
            answer = case.call(timeout=60)
            answered += 1
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)

        one()
    return answered


def test_requests_made_from_the_description(server):
    assert run_generated(server, 400) >= 200
    assert_nothing_is_left(server)


JSON = {"content-type": "application/json"}
GOOD = [
    ("/v1/completions", {"prompt": "12", "max_tokens": 8}),
    ("/v1/completions", {"prompt": ["1", "23"], "max_tokens": 20, "stream": True, "n": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "7a+4"}], "max_tokens": 20}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "7a"}], "max_tokens": 20, "stream": True}),
    ("/v1/score", {"query": "7a+4b" * 30, "items": ["1", "2", "3"], "label_token_ids": [16, 17]}),
    ("/v1/rerank", {"query": "1", "documents": ["2", "3"], "label_token_ids": [16, 17]}),
    ("/v1/prefill", {"query": "7a+4b" * 30}),
]


class Mischief:
    """One client that does a random thing; `statuses` of what was answered."""

    def __init__(self, url: str) -> None:
        self.url, self.address = url, ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self.statuses: list[int] = []

    def act(self, seed: int) -> None:
        chance = random.Random(seed)
        kinds = [self.good, self.garbage, self.broken_json, self.huge, self.abort, self.abort, self.wrong_types]
        kinds += [self.slow] if chance.random() < 0.1 else []
        chance.choice(kinds)(chance)

    def _post(self, path: str, content: bytes) -> None:
        answer = httpx.post(self.url + path, content=content, headers=JSON, timeout=120)
        self.statuses.append(answer.status_code)

    def good(self, chance: random.Random) -> None:
        path, body = chance.choice(GOOD)
        self.statuses.append(httpx.post(self.url + path, json=body, timeout=120).status_code)

    def garbage(self, chance: random.Random) -> None:
        self._post(chance.choice(GOOD)[0], chance.randbytes(chance.randrange(300)))

    def broken_json(self, chance: random.Random) -> None:
        path, body = chance.choice(GOOD)
        text = bytearray(httpx.Request("POST", self.url, json=body).content)
        for _ in range(chance.randrange(1, 4)):
            text[chance.randrange(len(text))] = chance.randrange(256)
        self._post(path, bytes(text))

    def wrong_types(self, chance: random.Random) -> None:
        path, body = chance.choice(GOOD)
        values = [None, -1, 1e308, "", [], {}, [[]], "\x00", "x" * 1000, 1 << 70, True, [None], {"a": [1]}]
        body = {**body, chance.choice([*body, "n", "seed", "stop", "logprobs", "model"]): chance.choice(values)}
        self.statuses.append(httpx.post(self.url + path, json=body, timeout=120).status_code)

    def huge(self, chance: random.Random) -> None:
        self._post(chance.choice(GOOD)[0], b'{"prompt": "' + b"1" * chance.choice([150_000, 250_000]) + b'"}')

    def _raw(self, chance: random.Random) -> bytes:
        path, body = chance.choice(GOOD)
        content = httpx.Request("POST", self.url, json=body).content
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(content)}\r\n\r\n"
        return head.encode() + content

    def abort(self, chance: random.Random) -> None:
        """Leave in the middle of the request, or of the answer."""
        raw = self._raw(chance)
        with socket.create_connection(self.address, timeout=60) as connection:
            connection.sendall(raw[: chance.randrange(1, len(raw) + 1)])
            time.sleep(chance.random() * 0.05)

    def slow(self, chance: random.Random) -> None:
        raw = self._raw(chance)
        with socket.create_connection(self.address, timeout=60) as connection:
            connection.sendall(raw[:-5])
            time.sleep(0.6)
            self.statuses.append(int(connection.recv(100).split()[1]))


def make_mischief(server, count: int, clients: int = 8) -> list[int]:
    mischief = Mischief(server.url)
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(mischief.act, range(count)))
    return mischief.statuses


def test_mischief_gets_no_server_error(server):
    statuses = make_mischief(server, 300)
    assert max(statuses) < 500 and {200, 422, 413, 400} <= set(statuses)
    assert_nothing_is_left(server)


def test_64_clients_of_whom_some_leave(server):
    path, body = GOOD[3]
    finished = []

    def client(number: int) -> None:
        leaves = number % 5 == 0
        with httpx.stream("POST", server.url + path, json=body, timeout=120) as answer:
            for seen, _ in enumerate(answer.iter_lines()):
                if leaves and seen > 2:
                    return
            finished.append(answer.status_code)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert finished == [200] * 51
    assert_nothing_is_left(server)


def test_sigterm_under_load_loses_no_accepted_request():
    command = [sys.executable, "-m", "limbeck", "serve", "tiny-student", "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            url = process.stdout.readline().split()[-1]
            while not is_healthy(url):
                time.sleep(0.05)
            outcomes = load_until_refused(url, process)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    assert set(outcomes) <= {"whole", "refused"}, outcomes
    assert outcomes.count("whole") > 8


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def load_until_refused(url: str, process: subprocess.Popen) -> list[str]:
    """16 clients ask again and again; the signal comes while all are served."""
    outcomes: list[str] = []
    body = {"prompt": "12", "max_tokens": 60, "ignore_eos": True, "stream": True}

    def client() -> None:
        while True:
            try:
                with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
                    if answer.status_code != 200:
                        outcomes.append("refused" if answer.status_code == 503 else str(answer.status_code))
                        return
                    is_whole = list(answer.iter_lines())[-2:] == ["data: [DONE]", ""]
                    outcomes.append("whole" if is_whole else "cut")
            except httpx.ConnectError:
                outcomes.append("refused")
                return
            except httpx.TransportError as error:
                outcomes.append(repr(error))
                return

    threads = [threading.Thread(target=client) for _ in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    return outcomes


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_requests_leave_nothing_behind(server):
    answered = run_generated(server, 5000)
    assert answered > 2000
    assert max(make_mischief(server, 2000)) < 500
    assert_nothing_is_left(server)
    before = resident_bytes()  # behind the allocator's growth to what so many threads need
    assert max(make_mischief(server, 8000 - answered)) < 500
    assert_nothing_is_left(server)
    assert resident_bytes() - before < 40 << 20
