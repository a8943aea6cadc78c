"""Forms of replies: held, bounded in time and memory, given up with their client, and harmful to nobody else."""

import json
import threading
import time
from pathlib import Path

import httpx
import pytest
from limbeck_server import RunningServer
from made_tokenizers import CHATML
from written_models import save_exportable

HEAVY = {"type": "integer", "multipleOf": 20_000_003}
"""Takes minutes and gigabytes to compile."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_exportable(directory, max_position_embeddings=512)
    (directory / "chat_template.jinja").write_text(CHATML)
    limits = {"form_seconds": 0.5, "form_bytes": 96 << 20}
    with RunningServer(str(directory), limits=limits, name="m") as running:
        yield running


def chat(server, timeout=None, **more):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 60, "seed": 1, "temperature": 2, **more}
    return server.post(
        "/v1/chat/completions", body, headers={} if timeout is None else {"x-request-timeout-seconds": timeout}
    )


def schema(tree):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": tree}}}


ENUM = {"type": "object", "properties": {"k": {"enum": ["u", "v"]}}, "required": ["k"], "additionalProperties": False}


@pytest.mark.parametrize(
    "asked",
    [
        schema(ENUM),
        {"response_format": {"type": "json_object", "schema": ENUM}},
        {"structured_outputs": {"json": ENUM}},
        {"structured_outputs": {"json": json.dumps(ENUM)}},
    ],
)
def test_a_schema_holds_in_every_spelling(server, asked):
    answer = chat(server, **asked, n=4).json()
    assert {json.loads(choice["message"]["content"])["k"] for choice in answer["choices"]} <= {"u", "v"}


def test_long_choices_hold(server):
    options = [f"option {number}" for number in range(2300)]
    (choice,) = chat(server, structured_outputs={"choice": options}).json()["choices"]
    assert choice["message"]["content"] in options and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (schema({"$ref": "#"}), "json_schema"),
        (schema({"type": "number", "not": {}}), "json_schema"),
        ({"structured_outputs": {"regex": "[z"}}, "regex"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {"json": "{"}}, "give a schema"),
        ({"structured_outputs": {}}, "give json"),
        ({"structured_outputs": {"grammar": "x"}}, "grammar"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "more than one form"),
        ({**schema(ENUM), "structured_outputs": {"choice": ["a"]}}, "more than one form"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is needed"),
        ({"response_format": {"type": "json_schema", "json_schema": ENUM}}, "schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_what_is_no_form_is_told(server, asked, told):
    answer = chat(server, **asked)
    assert answer.status_code == 422 and told in answer.json()["error"]["message"], answer.text


def test_a_heavy_form_is_refused_in_time_and_memory_while_others_write(server):
    forms = server.service.forms
    stories = []
    asked = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "seed": 3}
    story = threading.Thread(target=lambda: stories.append(server.post("/v1/completions", asked)))
    before = resident_bytes()
    story.start()
    start = time.monotonic()
    answer = chat(server, **schema(HEAVY))
    assert time.monotonic() - start < 10
    assert answer.status_code == 422 and "compile" in answer.json()["error"]["message"]
    story.join()
    assert stories[0].json()["usage"]["completion_tokens"] == 300
    assert resident_bytes() - before < 150 << 20
    start = time.monotonic()
    assert chat(server, **schema(HEAVY)).status_code == 422  # known by now
    assert time.monotonic() - start < 0.4
    assert forms._answers == {}


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_form_counts_against_the_time_of_its_request(server):
    start = time.monotonic()
    answer = chat(server, timeout="0.1", **schema({**HEAVY, "multipleOf": 20_000_021}))
    assert answer.status_code == 408 and time.monotonic() - start < 0.45


def test_a_form_is_given_up_with_its_client(server):
    def leave(number):
        body = {"messages": [{"role": "user", "content": "a"}], **schema({**HEAVY, "multipleOf": 20_000_100 + number})}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/chat/completions", json=body, timeout=0.15)

    threads = [threading.Thread(target=leave, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    start = time.monotonic()
    assert chat(server, **schema({"type": "boolean"})).json()["choices"][0]["message"]["content"] in ("true", "false")
    assert time.monotonic() - start < 3


def test_forms_that_are_kept_have_a_budget(server):
    forms = server.service.forms
    for number in range(30):
        assert chat(server, structured_outputs={"choice": [f"x{number}"]}).status_code == 200
    kept = sum(one.size_bytes for one in forms._kept.values())
    assert kept + server.service.scorer.cache_stats().used_bytes == server.service.budget.used_bytes


def test_the_process_apart_may_die(server):
    process = server.service.forms._starting.result()
    process.kill()
    time.sleep(0.3)
    assert chat(server, structured_outputs={"choice": ["after", "all"]}).status_code == 200


def test_a_tokenizer_that_has_no_forms_is_told():
    with RunningServer() as tiny:
        answer = chat(tiny, **schema(ENUM))
        assert answer.status_code == 422 and "vocabulary" in answer.json()["error"]["message"]
