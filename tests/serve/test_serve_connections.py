"""The edge of the network: who holds connections open, dribbles, or reads nothing, harms nobody else."""

import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from limbeck_server import RunningServer
from uvicorn.protocols.http.h11_impl import H11Protocol

from limbeck.serve.config import LimitsConfig
from limbeck.serve.connections import Connections
from limbeck.serve.logs import CHARACTERS, Bounded, Short

PROTOCOLS = [H11Protocol]
try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    PROTOCOLS.append(HttpToolsProtocol)
except ImportError:
    pass
LIMITS = {"header_seconds": 0.4, "header_bytes": 3000, "connections": 6, "idle_seconds": 1.0}


@pytest.fixture(scope="module", params=PROTOCOLS)
def server(request):
    with RunningServer(protocol=request.param, limits=LIMITS) as running:
        yield running


def connect(server, sent=b""):
    connection = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    connection.settimeout(10)
    connection.sendall(sent)
    return connection


def is_closed(connection):
    """Waits for the other side."""
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhost: loc"])
def test_who_sends_no_whole_header_is_closed(server, sent):
    start = time.monotonic()
    with connect(server, sent) as connection:
        assert is_closed(connection)
    assert 0.2 < time.monotonic() - start < 5


def test_a_header_that_dribbles_has_no_more_time(server):
    start = time.monotonic()
    with connect(server, b"GET /health HTTP/1.1\r\n") as connection:
        try:
            while time.monotonic() - start < 5:
                connection.sendall(b"a: b\r\n")
                time.sleep(0.05)
        except OSError:
            pass
    assert time.monotonic() - start < 3


def test_too_many_bytes_of_headers(server):
    many = "".join(f"x-{number}: {'y' * 90}\r\n" for number in range(40))
    with connect(server, f"GET /health HTTP/1.1\r\nhost: localhost\r\n{many}\r\n".encode()) as connection:
        try:
            answer = connection.recv(100)
        except ConnectionResetError:
            answer = b""
    assert answer == b"" or answer.split()[1] in (b"400", b"431")
    assert httpx.get(server.url + "/health").status_code == 200


def test_idle_connections_make_room(server):
    held = [connect(server) for _ in range(20)]
    assert httpx.get(server.url + "/health", timeout=5).status_code == 200
    assert all(map(is_closed, held[:10]))
    for connection in held:
        connection.close()


def test_requests_one_behind_the_other_on_a_connection(server):
    request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with connect(server, request * 3) as connection:
        answer = b""
        while answer.count(b'{"status":"ok"}') < 3:
            answer += connection.recv(1000)
        time.sleep(0.6)  # longer than a header may take: between requests there is none
        connection.sendall(request)
        assert b"200 OK" in connection.recv(1000)


def test_descriptors_that_are_few_leave_room_for_others(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (160, 160))
    few = Connections(LimitsConfig())
    assert few.most + few.backlog < 160 and few.most >= 50


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_that_reads_nothing_is_let_go(protocol):
    body = {"prompt": "12", "max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": 20, "n": 16}
    content = json.dumps(body).encode()
    with RunningServer(protocol=protocol, limits={"seconds": 1.0}) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(0.5)
        end = time.monotonic() + 20
        while server.gate.under_way:
            assert time.monotonic() < end, "it is held for ever"
            time.sleep(0.05)
        connection.close()


@pytest.mark.slow
def test_the_end_has_its_grace():
    """A text that takes longer is told so, and the process ends."""
    command = [sys.executable, "-m", "limbeck", "serve", "tiny-student", "--port", "0", "--limits.grace-seconds", "1.5"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            url = next(line for line in process.stderr if " at http" in line).split()[-1]
            body = {"prompt": "12", "max_tokens": 900, "ignore_eos": True, "stream": True, "n": 32}
            for _ in range(600):
                try:
                    httpx.get(url + "/health")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                start = time.monotonic()
                told = [line for line in lines if line]
            assert process.wait(timeout=60) == 0
            assert time.monotonic() - start < 20  # the texts would take longer
            assert "shutting down" in "".join(told[-2:]) or told[-1:] == ["data: [DONE]"]
        finally:
            process.kill()


def record(text):
    return logging.LogRecord("x", logging.WARNING, "", 0, text, (), None)


def test_the_log_is_bounded(monkeypatch):
    bounded = Bounded(most=3)
    assert [bounded.filter(record("a")) for _ in range(10)] == [True] * 3 + [False] * 7
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    late = record("b")
    assert bounded.filter(late) and late.getMessage() == "(7 records were kept back) b"
    assert len(Short().format(record("c" * 100_000))) < CHARACTERS + 100
