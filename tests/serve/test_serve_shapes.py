"""Answers have the shapes that the clients' own types ask for, and calls of Open WebUI come through."""

import json
import typing

import cohere
import httpx
import openai.types as shapes
import pytest
from limbeck_server import RunningServer
from openai.types import chat as chats
from openai.types import responses
from pydantic import TypeAdapter

MESSAGES = [{"role": "user", "content": "7a+4b*3c-8d+9"}]
CHAT = {"messages": MESSAGES, "max_tokens": 300, "seed": 3}
TEXT = {"prompt": ["7a", "12"], "max_tokens": 9, "n": 2, "logprobs": 2}
LOG_PROBS = {"logprobs": True, "top_logprobs": 3}


@pytest.fixture(scope="module")
def server():
    with RunningServer(name="tiny") as running:
        yield running


def events(server, path, body, **headers):
    with httpx.stream("POST", server.url + path, json={**body, "stream": True}, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        ("/v1/completions", TEXT, shapes.Completion),
        ("/v1/chat/completions", {**CHAT, "n": 2}, chats.ChatCompletion),
        ("/v1/chat/completions", {**CHAT, **LOG_PROBS}, chats.ChatCompletion),
        ("/v1/responses", {"input": "12"}, responses.Response),
        ("/v1/responses", {"input": MESSAGES, "max_output_tokens": 2}, responses.Response),
    ],
)
def test_whole_answers(server, path, body, shape):
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    TypeAdapter(shape).validate_json(answer.content, strict=True)


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        ("/v1/chat/completions", {**CHAT, **LOG_PROBS, "n": 2}, chats.ChatCompletionChunk),
        ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}, chats.ChatCompletionChunk),
    ],
)
def test_events_of_streams(server, path, body, shape):
    found = events(server, path, body)
    assert len(found) > 3
    for event in found:
        TypeAdapter(shape).validate_json(json.dumps(event), strict=True)


def test_events_of_responses_each_of_their_own_kind(server):
    (union, *_) = typing.get_args(responses.ResponseStreamEvent)
    kinds = {typing.get_args(kind.model_fields["type"].annotation)[0]: kind for kind in typing.get_args(union)}
    asked = {"input": MESSAGES[0]["content"], "max_output_tokens": 300, "temperature": 0}
    found = events(server, "/v1/responses", asked)
    assert [event["sequence_number"] for event in found] == list(range(len(found))) and len(found) > 7
    for event in found:
        TypeAdapter(kinds[event["type"]]).validate_json(json.dumps(event), strict=True)


def test_models_and_rankings(server):
    tree = httpx.get(server.url + "/v1/models").json()
    assert [TypeAdapter(shapes.Model).validate_python(one).id for one in tree["data"]] == ["tiny"]
    body = {"query": "12", "documents": ["3", "4"], "label_token_ids": [16, 17]}
    for path, shape in [("/v2/rerank", cohere.V2RerankResponse), ("/v1/rerank", cohere.RerankResponse)]:
        ranking = TypeAdapter(shape).validate_python(server.post(path, body).json())
        assert sorted(one.index for one in ranking.results) == [0, 1]


def test_calls_as_open_webui_makes_them(server):
    """Its list of models, a chat with the fields that it forwards, and the title that it asks for afterwards."""
    headers = {
        "authorization": "Bearer none",
        "http-referer": "https://openwebui.com/",
        "x-title": "Open WebUI",
        "x-openwebui-user-name": "A",
        "x-openwebui-chat-id": "7f",
    }
    models = httpx.get(server.url + "/v1/models", headers=headers).json()
    (model,) = [entry["id"] for entry in models["data"]]
    asked = {
        "model": model,
        "messages": [{"role": "system", "content": "1"}, *MESSAGES],
        "stream_options": {"include_usage": True},
        "max_tokens": 40,
        "frequency_penalty": 0,
        "user": {"name": "A", "id": "1", "email": "a@example.org", "role": "user"},
        "metadata": {"chat_id": "7f", "message_id": "8", "session_id": "9", "files": None, "features": {}},
        "tool_ids": None,
        "files": None,
        "features": {"web_search": False, "code_interpreter": False},
        "variables": {"{{USER_NAME}}": "A"},
        "background_tasks": {"title_generation": True},
        "chat_id": "7f",
        "session_id": "9",
        "id": "8",
    }
    found = events(server, "/v1/chat/completions", asked, **headers)
    assert found[-1]["usage"]["total_tokens"] > 0 and found[-2]["choices"][0]["finish_reason"]
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    title = {
        "model": model,
        "messages": MESSAGES,
        "stream": False,
        "max_completion_tokens": 50,
        "metadata": {"task": "t"},
    }
    answer = server.post("/v1/chat/completions", title, headers=headers)
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"
