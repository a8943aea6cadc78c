"""One budget for prefixes, texts, forms and masks; and texts that fail or stall, beside others."""

import threading
import time

import pytest
from limbeck_server import RunningServer
from made_tokenizers import CHATML
from written_models import save_exportable

from limbeck.engine.constraints import GrammarConstraint

STORY = {"prompt": "the her", "max_tokens": 60, "ignore_eos": True, "seed": 3, "temperature": 1.5}
MEMORY_BYTES = 3 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_exportable(directory, max_position_embeddings=4096)
    (directory / "chat_template.jinja").write_text(CHATML)
    return str(directory)


@pytest.fixture(scope="module")
def server(model):
    with RunningServer(model, limits={"memory_bytes": MEMORY_BYTES, "new_tokens": 4000, "seconds": 60}) as running:
        yield running


@pytest.fixture(scope="module")
def roomy(model):
    """Forms take megabytes."""
    with RunningServer(model) as running:
        yield running


def test_what_needs_more_than_all_of_it_is_refused_by_name(server):
    text = {"prompt": "the", "max_tokens": 3900}
    assert 3900 * server.service.decoder.bytes_per_token < MEMORY_BYTES  # by itself it has room
    per_token = server.service.decoder.bytes_per_token
    server.service.budget.total_bytes = 2000 * per_token
    try:
        for path, body in [
            ("/v1/completions", text),
            ("/v1/score", {"query": "the " * 2500, "items": ["a"], "labels": ["a", "b"]}),
            ("/v1/prefill", {"query": "the " * 2500}),
        ]:
            answer = server.post(path, body)
            told = answer.json()["error"]["message"]
            assert answer.status_code == 422 and f"limits.memory_bytes is {2000 * per_token}" in told, told
    finally:
        server.service.budget.total_bytes = MEMORY_BYTES


def test_the_oldest_gives_way_and_texts_wait_for_their_turn(server):
    budget, most = server.service.budget, 0
    for number in range(6):  # prefixes that fill it
        assert (
            server.post("/v1/score", {"query": f"{number} " * 900, "items": ["a"], "labels": ["a", "b"]}).status_code
            == 200
        )
    held = server.service.scorer.cache_stats().used_bytes
    answers = []
    asked = {"prompt": "the", "max_tokens": 1500, "ignore_eos": True, "n": 2}
    threads = [threading.Thread(target=lambda: answers.append(server.post("/v1/completions", asked))) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, budget.used_bytes)
        time.sleep(0.01)
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [3000] * 4
    assert held > MEMORY_BYTES // 4 and server.service.scorer.cache_stats().evicted_blocks > 0
    assert MEMORY_BYTES // 2 < most <= MEMORY_BYTES
    assert budget.used_bytes == server.service.scorer.cache_stats().used_bytes


def test_a_text_waits_until_a_pin_is_let_go(server):
    pins = []
    while (answer := server.post("/v1/prefill", {"query": f"{len(pins)} " * 1200})).status_code == 200:
        pins.append(answer.json()["id"])
    assert answer.status_code == 429 and pins
    answers = []
    asked = {**STORY, "max_tokens": 3000}
    thread = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", asked)))
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    for pin in pins:
        server.service.worker.unpin(pin)
    thread.join(30)
    assert answers[0].json()["usage"]["completion_tokens"] == 3000


def choose(server, options):
    body = {"messages": [{"role": "user", "content": "a"}], "structured_outputs": {"choice": options}}
    return server.post("/v1/chat/completions", body)


@pytest.mark.parametrize("kind", ["fault", "stall"])
def test_a_text_whose_form_fails_ends_alone(roomy, monkeypatch, kind):
    server = roomy
    over = threading.Event()
    real = GrammarConstraint.allowed

    def allowed(constraint):
        if constraint._vocab_size == 7:
            over.wait(30) if kind == "stall" else 1 / 0
        return real(constraint)

    monkeypatch.setattr(GrammarConstraint, "allowed", allowed)
    make = server.service.forms.constraint

    def constraint(compiled, ends):
        made = make(compiled, ends)
        made._vocab_size = 7
        return made

    before = server.post("/v1/completions", STORY).json()["choices"]
    monkeypatch.setattr(server.service.forms, "constraint", constraint)
    bad, good = [], []
    threads = [threading.Thread(target=lambda: bad.append(choose(server, ["the", "her"]))) for _ in range(3)]
    threads += [threading.Thread(target=lambda: good.append(server.post("/v1/completions", STORY))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    assert [answer.json()["choices"] for answer in good] == [before] * 3
    assert {answer.status_code for answer in bad} == {422 if kind == "stall" else 500}
    if kind == "stall":
        assert "The text has stalled in its form" in bad[0].json()["error"]["message"]
    assert server.service.generator.running == 0


def test_a_pass_that_fails_ends_the_text_it_fails_for(server, monkeypatch):
    steps = server.service.generator.steps
    real = steps.run

    def run(segments):
        if any(segment.prefix.room == 3 + 77 for segment in segments):
            raise RuntimeError("a fault of a kernel")
        return real(segments)

    before = server.post("/v1/completions", STORY).json()["choices"]
    monkeypatch.setattr(steps, "run", run)
    asked = [STORY, {"prompt": [5, 6, 7], "max_tokens": 77}, STORY, {**STORY, "seed": 9}]
    answers = {}
    threads = [
        threading.Thread(target=lambda n=n, body=body: answers.update({n: server.post("/v1/completions", body)}))
        for n, body in enumerate(asked)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[n].status_code for n in range(4)] == [200, 500, 200, 200]
    assert answers[0].json()["choices"] == answers[2].json()["choices"] == before
    assert answers[1].json()["error"]["type"] == "server_error"


def test_an_engine_that_does_not_answer_is_told(server, monkeypatch):
    monkeypatch.setattr("limbeck.serve.worker.STALL_SECONDS", 0.2)
    monkeypatch.setattr("limbeck.serve.ticket.LATE_SECONDS", 0.3)
    over, real = threading.Event(), server.service.scorer.score
    monkeypatch.setattr(server.service.scorer, "score", lambda requests: (over.wait(20), real(requests))[1])
    body = {"query": "the", "items": ["a"], "labels": ["a", "b"]}
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(server.post("/v1/score", body, headers={"x-request-timeout-seconds": "0.5"}))
    )
    asking.start()
    asking.join(10)
    assert answers[0].status_code == 503 and "does not answer" in answers[0].json()["error"]["message"]
    refused = server.post("/v1/score", body)
    assert refused.status_code == 503 and "at one step" in refused.json()["error"]["message"]
    over.set()
    time.sleep(0.5)
    monkeypatch.undo()
    assert server.post("/v1/score", body).status_code == 200
