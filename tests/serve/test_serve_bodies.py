"""Bodies: bounded, read beside the loop, errors in the user's words, null for what is not given, no field dropped."""

import threading
import time
from pathlib import Path

import httpx
import pytest
from limbeck_server import RunningServer

JSON = {"content-type": "application/json"}
STALL_SECONDS = 3.0
"""Loose, since the machine may be busy with other things; what it rules out took minutes."""
LABELS = {"label_token_ids": [16, 17]}


@pytest.fixture(scope="module")
def server():
    with RunningServer() as running:
        yield running


class Pulse(threading.Thread):
    """How long a probe waits while something else goes on."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self._url, self._over, self.slowest = url, threading.Event(), 0.0

    def run(self):
        client = httpx.Client()
        while not self._over.is_set():
            start = time.monotonic()
            client.get(self._url + "/health")
            self.slowest = max(self.slowest, time.monotonic() - start)
            time.sleep(0.01)

    def __enter__(self):
        self.start()
        time.sleep(0.1)
        return self

    def __exit__(self, *_):
        self._over.set()
        self.join()


def listed(element, megabytes):
    return ",".join([element] * int(megabytes * (1 << 20) / (len(element) + 1)))


@pytest.mark.parametrize("megabytes", [0.4, 7.9])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", '{"prompt":[%s]}'),
        ("/v1/completions", '{"prompt":"a","stop":[%s]}'),
        ("/v1/score", '{"query":"a","items":[%s]}'),
        ("/v2/rerank", '{"query":"a","documents":[%s]}'),
        ("/v1/chat/completions", '{"messages":[%s]}'),
        ("/tokenize", '{"prompt":[%s]}'),
    ],
)
def test_a_large_body_that_is_wrong_costs_little(server, path, body, megabytes):
    content = (body % listed('{"a":[]}', megabytes)).encode()
    before = resident_bytes()
    with Pulse(server.url) as pulse:
        answer = httpx.post(server.url + path, content=content, headers=JSON, timeout=60)
    assert answer.status_code == 422
    assert pulse.slowest < STALL_SECONDS
    assert resident_bytes() - before < 200 << 20


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a"] * 100_000}),
        ("/v1/score", {"query": "a", "items": ["b"] * 100_000, **LABELS}),
        ("/v1/score", {"text_1": "a", "text_2": ["b"] * 100_000, **LABELS}),
        ("/v2/rerank", {"query": "a", "documents": ["b"] * 100_000, **LABELS}),
    ],
)
def test_too_many_texts_are_refused_before_they_are_tokenised(server, monkeypatch, path, body):
    monkeypatch.setattr(server.service.texts, "_batch", lambda texts, special: 1 / 0)
    start = time.monotonic()
    answer = server.post(path, body)
    assert answer.status_code == 422 and "limit is" in answer.json()["error"]["message"]
    assert time.monotonic() - start < 10


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_large_body_that_is_right(server):
    """Half a million ids, of which the model reads what it can."""
    answer = httpx.post(server.url + "/v1/completions", json={"prompt": [16] * 500_000}, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    text = server.post("/v1/completions", {"prompt": "12+" * 1_000_000})
    assert text.status_code == 400 and text.json()["error"]["code"] == "context_length_exceeded"


MESSAGE = {"messages": [{"role": "user", "content": "12"}], "max_tokens": 2}
CASES = {
    "/v1/completions": [
        ({"prompt": ["1", 2]}, "prompt", "element 1 is a number"),
        ({"prompt": [1, "2"]}, "prompt", "element 1 is a text"),
        ({"prompt": [True]}, "prompt", "element 0 is a boolean"),
        ({"prompt": [1.5]}, "prompt", "element 0 is a number"),
        ({"prompt": [-3]}, "prompt", "0 or more"),
        ({"prompt": {"a": 1}}, "prompt", "an object"),
        ({"prompt": "1", "stop": ["x"] * 17}, "stop", "the limit is 16"),
        ({"prompt": "1", "stop": [""]}, "stop", "1 to 1000 characters"),
        ({"prompt": "1", "stop": 5}, "stop", "give a text"),
        ({"prompt": "1", "logprobs": "many"}, "logprobs", "0 to 20"),
        ({"prompt": "1", "n": 64, "max_tokens": 900, "logprobs": 20}, "logprobs", "log-probs"),
        (
            {"prompt": "1", "response_format": {"type": "json_schema", "json_schema": {"name": 3}}},
            "response_format",
            "",
        ),
    ],
    "/v1/score": [
        ({"query": ["1", "2"], "items": ["3"], **LABELS}, "query", "element 0 is a text"),
        ({"query": "1", "items": ["3", 4], **LABELS}, "items", "element 1"),
        (
            {"query": "1", "items": "3", "label_token_ids": [16], "apply_softmax": True},
            "label_token_ids",
            "two or more",
        ),
        ({"query": "1", "items": "3", "label_token_ids": [16, 16]}, "label_token_ids", "twice"),
        ({"query": "1", "items": "3", "labels": ["1", "1"]}, "labels", "twice"),
    ],
    "/v1/rerank": [
        ({"query": "1", "documents": [{"title": "3"}], **LABELS}, "documents", "element 0"),
        ({"query": "1", "documents": ["3"], "labels": ["1"]}, "labels", "two or more"),
        ({"query": "1", "documents": ["3"] * 1001, **LABELS}, "documents", "1000"),
    ],
    "/v1/chat/completions": [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"messages": [{"role": "user"}]}, "messages", "messages.0.content"),
        ({**MESSAGE, "tool_choice": "required"}, "tool_choice", "auto and none"),
        ({**MESSAGE, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "no place for tools"),
        ({**MESSAGE, "tools": ["f"]}, "tools", "tools.0"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages", "no role tool"),
        ({**MESSAGE, "continue_final_message": True, "add_generation_prompt": False}, "continue_final_message", ""),
    ],
}


@pytest.mark.parametrize(
    ("path", "body", "param", "told"), [(p, *case) for p, cases in CASES.items() for case in cases]
)
def test_errors_speak_of_the_users_field(server, path, body, param, told):
    answer = server.post(path, body)
    error = answer.json()["error"]
    assert answer.status_code == 422 and error["param"] == param and told in error["message"], error
    assert not any(word in error["message"] for word in ("union", "constrained", "function-"))


DROPPED_ELSEWHERE = {
    "guided_regex": "a", "guided_grammar": "x", "ebnf": "x", "bad_words_ids": [[1]], "repeat_penalty": 1.3,
    "use_beam_search": True, "length_penalty": 2.0, "prompt_logprobs": 3, "skip_special_tokens": False,
    "lora_path": "x", "enable_thinking": False, "n_predict": 3, "mirostat": 2, "logit_bias": {"5": -100},
    "frequency_penalty": -0.5,
    "documents": [{"text": "a"}], "include_stop_str_in_output": True, "suffix": "b", "best_of": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPED_ELSEWHERE)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_known_fields_are_refused_by_name(server, name, path):
    body = MESSAGE if "chat" in path else {"prompt": "12", "max_tokens": 2}
    answer = server.post(path, {**body, name: DROPPED_ELSEWHERE[name]})
    assert answer.status_code == 422 and answer.json()["error"]["param"] == name
    assert name in answer.json()["error"]["message"]


def test_values_that_change_nothing_are_taken(server):
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "best_of": 1,
    }
    neutral |= {
        "skip_special_tokens": True,
        "bad_words": [],
        "suffix": "",
        "use_beam_search": False,
        "user": "somebody",
    }
    neutral |= {"function_call": "none", "tools": [], "metadata": {"a": "b"}, "store": True, "unheard_of": 5}
    assert server.post("/v1/chat/completions", {**MESSAGE, **neutral}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "12", "max_tokens": 1}),
        ("/v1/chat/completions", MESSAGE),
        ("/v1/score", {"query": "1", "items": ["2"], **LABELS}),
        ("/v2/rerank", {"query": "1", "documents": ["2"], **LABELS}),
        ("/tokenize", {"prompt": "12"}),
        ("/v1/prefill", {"query": "12"}),
    ],
)
def test_null_is_not_given(server, path, body):
    described = httpx.get(server.url + "/openapi.json").json()["paths"][path]["post"]
    fields = described["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert len(fields) > 2
    nulls = {name: None for name in fields if name not in body}
    answer = server.post(path, {**nulls, "cache_salt": None, "guided_json": None, **body})
    assert answer.status_code == 200, answer.text


def test_another_model_does_not_exist(server):
    for path, body in (("/v1/chat/completions", MESSAGE), ("/v1/score", {"query": "1", "items": ["2"], **LABELS})):
        answer = server.post(path, {**body, "model": "some-other"})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        assert server.post(path, {**body, "model": ""}).status_code == 200


def test_a_reply_with_many_log_probs_does_not_hold_the_loop(server):
    body = {"prompt": "12", "n": 64, "logprobs": 20, "max_tokens": 100, "ignore_eos": True, "seed": 1}
    with Pulse(server.url) as pulse:
        answer = server.post("/v1/completions", body)
    assert len(answer.json()["choices"]) == 64
    assert all(len(choice["logprobs"]["tokens"]) == 100 for choice in answer.json()["choices"])
    assert pulse.slowest < STALL_SECONDS
