"""Scoring over HTTP in every spelling, limits, refusals, and letting go."""

import json
import shutil
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from limbeck_server import RunningServer

from limbeck.config import to_dict
from limbeck.models.load import load_model, load_tokenizer, locate
from limbeck.ranking.featurize import FeaturizeConfig

JSON = {"content-type": "application/json"}
QUERY, ITEMS, LABELS = "12+3", ["=1", "=", ""], [16, 17]


@pytest.fixture(scope="module")
def server():
    with RunningServer() as running:
        yield running


@pytest.fixture(scope="module")
def expected():
    """P(label) over the vocabulary behind query and item, from plain forward passes."""
    model, tokenizer = load_model("tiny-student"), load_tokenizer("tiny-student")
    rows = []
    for item in ITEMS:
        ids = tokenizer(QUERY)["input_ids"] + tokenizer(item)["input_ids"]
        with torch.inference_mode():
            rows.append(model(torch.tensor([ids])).logits[0, -1].softmax(-1)[LABELS])
    return torch.stack(rows)


def score(server, **body):
    answer = server.post("/v1/score", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_sglang_shape(server, expected):
    answer = score(server, query=QUERY, items=ITEMS, label_token_ids=LABELS, return_label_mass=True)
    torch.testing.assert_close(torch.tensor(answer["scores"]), expected, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(answer["label_mass"]), expected.sum(1), atol=1e-7, rtol=1e-4)
    assert answer["object"] == "scoring" and answer["model"] == "tiny-student"
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 7


def test_softmax_over_the_labels(server, expected):
    answer = score(server, query=QUERY, items=ITEMS, label_token_ids=LABELS, apply_softmax=True)
    among = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(torch.tensor(answer["scores"]), among, atol=1e-5, rtol=1e-4)


def test_token_ids_labels_as_text_and_one_item(server, expected):
    answer = score(server, query=[16, 17, 41, 18], items="=1", labels=["1", "2"])
    torch.testing.assert_close(torch.tensor(answer["scores"]), expected[:1], atol=1e-7, rtol=1e-4)


def test_item_first(server):
    first = score(server, query="=1", items=["12+3", "4"], label_token_ids=LABELS, item_first=True)["scores"]
    apart = [score(server, query=item, items=["=1"], label_token_ids=LABELS)["scores"][0] for item in ("12+3", "4")]
    for one, other in zip(first, apart, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("names", ["text_1 text_2", "data_1 data_2", "queries documents", "queries items"])
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_vllm_spellings(server, expected, names, path):
    left, right = names.split()
    among = (expected / expected.sum(1, keepdim=True))[:, 0].tolist()
    for query in (QUERY, [QUERY], [QUERY] * len(ITEMS)):
        answer = server.post(path, {left: query, right: ITEMS, "label_token_ids": LABELS}).json()
        assert [one["score"] for one in answer["data"]] == pytest.approx(among, rel=1e-4)
        assert [one["index"] for one in answer["data"]] == [0, 1, 2]


def test_no_items_no_scores(server):
    assert score(server, query=QUERY, items=[], label_token_ids=LABELS)["scores"] == []


WRONG = {
    "/v1/score": [
        ({"query": "1", "items": ["2"]}, "label_token_ids or labels"),
        ({"query": "1", "items": ["2"], "label_token_ids": [99]}, "The vocabulary has"),
        ({"query": "1", "items": ["2"], "labels": ["12"]}, "2 tokens"),
        ({"query": "1", "label_token_ids": [1]}, "items"),
        ({"query": "", "items": [""], "label_token_ids": [1]}, "nothing to score"),
        ({"query": [56], "items": ["1"], "label_token_ids": [1]}, "vocabulary"),
        ({"query": [-1], "items": ["1"], "label_token_ids": [1]}, "query"),
        ({"query": "1" * 1025, "items": ["1"], "label_token_ids": [1]}, "context length is 1024 tokens"),
        ({"query": "1", "items": ["1"] * 1001, "label_token_ids": [1]}, "limit is 1000"),
        ({"text_1": ["1", "2"], "text_2": ["1"], "label_token_ids": [1, 2]}, "1 and N"),
        ({"text_1": "1", "label_token_ids": [1, 2]}, "one of the pairs"),
    ],
    "/v1/rerank": [({"query": "1", "documents": []}, "documents"), ({"documents": ["1"]}, "query")],
    "/v1/completions": [
        ({"prompt": []}, "empty list"),
        ({"prompt": "1", "top_p": 0}, "top_p"),
        ({"prompt": "1", "temperature": -1}, "temperature"),
        ({"prompt": "1", "n": 129}, "n"),
        ({"prompt": ["1"] * 65, "n": 2}, "130 texts"),
        ({"prompt": "1", "max_tokens": 5000}, "maximum context length"),
        ({"prompt": "1", "min_tokens": 5, "max_tokens": 2}, "min"),
        ({"prompt": "1", "logprobs": 21}, "logprobs"),
        ({"prompt": "1", "stop": ""}, "stop"),
        ({"prompt": "1", "frequency_penalty": 0.5}, "frequency_penalty"),
        ({"prompt": "1", "stream_options": {}}, "stream_options"),
        ({"prompt": "1", "stop_token_ids": [99]}, "end tokens"),
    ],
    "/v1/chat/completions": [
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages.0: give an object"),
        ({"messages": [{"role": "alien", "content": "1"}]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "1"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "user", "content": "1" * 2000}]}, "context length"),
        ({"messages": [{"role": "user", "content": "1"}], "chat_template_kwargs": {"chat_template": ""}}, "setting"),
    ],
    "/tokenize": [({}, "prompt or messages")],
    "/v1/prefill": [({"query": ""}, "0 tokens")],
}


@pytest.mark.parametrize(("path", "body", "message"), [(p, *case) for p, cases in WRONG.items() for case in cases])
def test_what_cannot_be_done_is_said_clearly(server, path, body, message):
    answer = server.post(path, body)
    error = answer.json()["error"]
    is_too_long = "context length" in message
    assert answer.status_code == (400 if is_too_long else 422) and error["type"] == "invalid_request_error"
    assert error["code"] == ("context_length_exceeded" if is_too_long else 422)
    assert any(part in error["message"] for part in message.split("|")), error["message"]
    assert len(error["message"]) < 1100


RAW = {
    b"{": 400,
    b"": 400,
    b"[]": 422,
    b"null": 422,
    b'{"prompt": "\\ud800"}': 400,
    b'{"prompt": NaN}': 422,
    b'{"prompt": "a", "temperature": NaN}': 422,
    b'{"prompt": "a", "temperature": 1e999}': 422,
    b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}": 400,
    b"\xff\xfe": 400,
    b"[" * 100_000: 400,
    b'{"\\ud800": {"\\udfff": 1}, "prompt": 5}': 400,
}


@pytest.mark.parametrize("body", RAW, ids=lambda body: repr(body[:30]))
def test_malformed_bodies(server, body):
    answer = httpx.post(server.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == RAW[body], answer.text
    assert answer.json()["error"]["message"]


def test_a_body_that_calls_itself_a_form_is_refused(server):
    """As curl -d sends it."""
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = httpx.post(server.url + "/v1/completions", content=b'{"prompt": "7a+4"}', headers=headers)
    assert answer.status_code == 415
    assert "send the header content-type: application/json" in answer.json()["error"]["message"]


def test_a_prefix_sent_ahead_is_pinned_and_let_go(server):
    text = "7a+4b*3c-8d+9" * 20
    pinned = server.post("/v1/prefill", {"query": text}).json()
    assert pinned["tokens"] == len(text) and pinned["id"].startswith("pin-")
    before = server.service.scorer.cache_stats()
    score(server, query=text, items=["1", "2"], label_token_ids=LABELS)
    after = server.service.scorer.cache_stats()
    assert after.hit_tokens - before.hit_tokens == len(text)
    assert list(server.service.worker._pins) == [pinned["id"]]
    assert httpx.delete(f"{server.url}/v1/prefill/{pinned['id']}").json()["deleted"]
    assert httpx.delete(f"{server.url}/v1/prefill/unknown").status_code == 200
    wait_until(lambda: not server.service.worker._pins)


def test_pins_run_out_and_are_limited():
    with RunningServer(limits={"pins": 1, "pin_seconds": 0.5}) as server:
        assert server.post("/v1/prefill", {"query": "12"}).status_code == 200
        refused = server.post("/v1/prefill", {"query": "34"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        wait_until(lambda: not server.service.worker._pins)
        assert server.post("/v1/prefill", {"query": "34"}).status_code == 200


def test_too_large_and_too_slow_bodies():
    with RunningServer(limits={"body_bytes": 1000, "body_seconds": 0.3}) as server:
        assert server.post("/v1/completions", {"prompt": "1" * 1000}).status_code == 413
        chunks = (b"x" * 400 for _ in range(10))
        assert httpx.post(server.url + "/v1/completions", content=chunks, headers=JSON).status_code == 413
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as slow:
            head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            slow.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
            slow.settimeout(10)
            assert b" 408 " in slow.recv(1000).split(b"\r\n")[0]
        assert server.post("/v1/completions", {"prompt": "1"}).status_code == 200


def slow_text(**more):
    return {"prompt": "1", "max_tokens": 900, "ignore_eos": True, **more}


def test_who_does_not_fit_into_the_line_is_told_when_to_come_back():
    with RunningServer(limits={"waiting": 2}, generation={"max_running": 1}) as server:
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(server.post("/v1/completions", slow_text())))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}
        assert all(int(one.headers["retry-after"]) >= 1 for one in answers if one.status_code == 429)
        assert server.service.generator.running == 0


def test_deadlines():
    with RunningServer(generation={"max_running": 1}) as server:
        header = {"X-Request-Timeout-Seconds": "0.1"}
        running = server.post("/v1/completions", slow_text(n=4), headers=header)
        assert running.status_code == 408 and running.json()["error"]["type"] == "timeout_error"
        blocker = threading.Thread(target=server.post, args=("/v1/completions", slow_text(n=8)))
        blocker.start()
        wait_until(lambda: server.service.generator.running)
        assert server.post("/v1/completions", slow_text(), headers=header).status_code == 429
        # Scoring is not held up by texts under way.
        assert server.post("/v1/score", {"query": "1", "items": ["2"], "label_token_ids": [16]}).status_code == 200
        blocker.join()
        bad = server.post("/v1/completions", {"prompt": "1"}, headers={"X-Request-Timeout-Seconds": "never"})
        assert bad.status_code == 422
        with httpx.stream(
            "POST", server.url + "/v1/completions", json=slow_text(stream=True, n=8), headers=header
        ) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert "timeout_error" in lines[-2] and lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_client_leaves_is_not_computed(server, stream):
    with pytest.raises(httpx.ReadTimeout):  # noqa: SIM117
        with httpx.stream(
            "POST", server.url + "/v1/completions", json=slow_text(stream=stream, n=16, max_tokens=1000), timeout=0.3
        ) as answer:
            for _ in answer.iter_lines():
                time.sleep(0.05)
                if stream:
                    raise httpx.ReadTimeout("seen enough")
    wait_until(lambda: server.service.generator.running == 0 and server.gate.under_way == 0)
    assert server.service.dispatcher.running == server.service.dispatcher.waiting == 0


def test_a_request_that_breaks_in_the_engine_ends_alone(server, monkeypatch):
    scorer = server.service.scorer
    real = scorer.score

    def breaks(requests):
        if any(request.prefix[:2] == [20, 20] for request in requests):
            raise RuntimeError("a fault of the engine")
        return real(requests)

    monkeypatch.setattr(scorer, "score", breaks)
    good = {"query": "1", "items": ["2"], "label_token_ids": [16]}
    answers = {}
    threads = [
        threading.Thread(target=lambda i=i: answers.update({i: server.post("/v1/score", good)})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    bad = server.post("/v1/score", {**good, "query": [20, 20]})
    for thread in threads:
        thread.join()
    assert bad.status_code == 500 and bad.json()["error"]["type"] == "server_error"
    assert [answer.status_code for answer in answers.values()] == [200] * 4
    monkeypatch.undo()
    assert server.post("/v1/score", good).status_code == 200


def test_metrics_have_the_names_that_dashboards_know(server):
    before = counters(server)
    score(server, query="1234", items=["5", "6"], label_token_ids=LABELS, return_label_mass=True)
    server.post("/v1/completions", {"prompt": "12", "max_tokens": 5, "ignore_eos": True})
    server.post("/v1/completions", {"prompt": ""})
    after = counters(server)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["vllm:generation_tokens_total"] >= 5
    assert grown["vllm:prompt_tokens_total"] >= 8
    assert grown["vllm:time_to_first_token_seconds_count"] >= 1
    assert grown["vllm:inter_token_latency_seconds_count"] >= 4
    assert grown["vllm:request_success_total"] >= 2
    assert grown["limbeck:scored_items_total"] == grown["limbeck:label_mass_count"] == 2
    names = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
    names += ["prefix_cache_queries_total", "prefix_cache_hits_total"]
    assert all(f"vllm:{name}" in after for name in names)


def counters(server) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in httpx.get(server.url + "/metrics").text.splitlines():
        if not line.startswith("#"):
            name, value = line.split("{")[0].split(" ")[0], float(line.rsplit(" ", 1)[1])
            found[name] = found.get(name, 0.0) + value
    return found


def test_tokenize_and_back(server):
    found = server.post("/tokenize", {"prompt": "12 3", "return_token_strs": True}).json()
    assert found == {"count": 4, "max_model_len": 1024, "tokens": [16, 17, 46, 18], "token_strs": ["1", "2", " ", "3"]}
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "12 3"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "12"}]}).json()
    assert server.post("/detokenize", {"tokens": chat["tokens"]}).json()["prompt"].endswith("assistant\n")


def test_requests_that_wait_together_are_tokenised_in_one_call(server, monkeypatch):
    calls = []
    texts = server.service.texts
    real = texts._encoded

    def slow(batch, special):
        calls.append(len(batch))
        time.sleep(1.0)
        return real(batch, special)

    monkeypatch.setattr(texts, "_encoded", slow)
    threads = [threading.Thread(target=server.post, args=("/tokenize", {"prompt": "12"})) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(calls) == 10 and len(calls) <= 3


def test_a_ranking_model_brings_its_words(tmp_path):
    directory = tmp_path / "ranker"
    shutil.copytree(Path(locate("tiny-student").path), directory)
    features = FeaturizeConfig(labels=("1", "2"), prefix="{instruction}{member}{history}\n", candidate="{item}=")
    manifest = {"stage": "rank train", "config": {"features": to_dict(features)}}
    (directory / "limbeck.json").write_text(json.dumps(manifest))
    with RunningServer(str(directory)) as server:
        ranked = server.post("/v1/rerank", {"query": "1{2}", "documents": ["3", {"text": "4{document}"}]}).json()
        prefix = "Will the member like the item?1{2} none\n"
        asked = {"query": prefix, "items": ["3=", "4{document}="], "apply_softmax": True}
        values = [row[0] for row in score(server, **asked)["scores"]]
        found = {one["index"]: one["relevance_score"] for one in ranked["results"]}
        assert found == {0: values[0], 1: values[1]}
        assert [one["document"]["text"] for one in ranked["results"]][found[0] < found[1]] == "3"


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
