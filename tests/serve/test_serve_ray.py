"""Two replicas behind Ray Serve: answers of one server, and shared prefixes in one cache."""

import importlib.util
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from limbeck_server import RunningServer

missing = [name for name in ("ray", "grpc") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing), reason=f"pip install 'limbeck[ray-serve]': no {', '.join(missing)}"),
]
DEPLOY = """
import sys
from ray import serve
from limbeck.runner.cluster import connect
from limbeck.serve.ray_app import app
connect()
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(app({"model": "tiny-student", "replicas": "2", "api-key": "secret", "limits.seconds": 60}))
print("deployed", flush=True)
sys.stdin.read()
serve.shutdown()
"""
LABELS = {"items": ["1", "2", "3"], "label_token_ids": [16, 17]}


@pytest.fixture(scope="module")
def deployed():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", DEPLOY, str(port)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert any(line.startswith("deployed") for line in process.stdout), "it did not start"
            headers = {"authorization": "Bearer secret"}
            yield httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120)
        finally:
            process.stdin.close()
            process.wait(120)


def test_answers_are_those_of_one_server(deployed):
    text = {"prompt": "7a+4b*3c-8d+9", "max_tokens": 40, "temperature": 0, "logprobs": 1}
    score = {"query": "7a+4b*3c-8d+9=", **LABELS}
    with RunningServer() as alone:
        expected = alone.post("/v1/completions", text).json()["choices"]
        scores = alone.post("/v1/score", score).json()["scores"]
    assert deployed.post("/v1/completions", json=text).json()["choices"] == expected
    assert deployed.post("/v1/score", json=score).json()["scores"] == scores
    with deployed.stream("POST", "/v1/completions", json={**text, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 20


def test_the_edge_is_that_of_any_server(deployed):
    body = {"prompt": "12", "max_tokens": 2}
    assert deployed.post("/v1/completions", json=body, headers={"authorization": "Bearer no"}).status_code == 401
    assert deployed.post("/v1/completions", json=body, headers={"host": "attacker.test"}).status_code == 403
    assert deployed.post("/v1/completions", json=body, headers={"origin": "http://attacker.test"}).status_code == 403
    assert deployed.post("/v1/completions", json={"prompt": 5}).status_code == 422
    assert deployed.get("/v1/models").json()["data"][0]["id"] == "tiny-student"
    assert deployed.get("/health").json() == {"status": "ok"}
    refused = deployed.delete("/v1/prefill/pin-1")
    assert refused.status_code == 501 and "replica" in refused.json()["error"]["message"]


def test_shared_prefixes_stay_together(deployed):
    """Of six beginnings, each is computed once: all its requests find it in the cache but the first."""

    def ask(number):
        asked = {"prompt": f"{number % 6}a+4b*3c-8d+9" * 20 + str(number), "max_tokens": 1}
        return deployed.post("/v1/completions", json=asked).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(ask, range(6)))
        cached = list(pool.map(ask, range(6, 36)))
    assert first == [0] * 6 or sum(first) < 64
    assert sum(tokens >= 192 for tokens in cached) >= 27, cached


def test_who_leaves_lets_go(deployed):
    body = {"prompt": "12", "max_tokens": 900, "ignore_eos": True, "n": 32}
    for _ in range(6):
        with pytest.raises(httpx.ReadTimeout):
            deployed.post("/v1/completions", json=body, timeout=0.5)
    start = time.monotonic()
    assert deployed.post("/v1/completions", json={"prompt": "34", "max_tokens": 1}).status_code == 200
    assert time.monotonic() - start < 10
