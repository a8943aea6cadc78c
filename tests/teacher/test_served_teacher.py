"""The client and the served teacher: retries, the three dialects, and scores equal to the live model's."""

import json
import time

import httpx
import numpy as np
import pytest
import torch
from model_server import ModelServer
from tiny_runs import CPU, metrics_of, one_step, run_config

from limbeck.client import Client, ClientConfig, map_concurrently, retry_after_seconds, server_root
from limbeck.distill import train
from limbeck.distill.pair import load_teacher
from limbeck.distill.parallel import Ranks
from limbeck.errors import ConfigError, LimbeckError, PairError
from limbeck.models.load import load_tokenizer
from limbeck.teacher.served import Query, ServedTeacher, check_tokenizer, connect, detect, to_targets

QUICK = ClientConfig(backoff_seconds=0.001, max_backoff_seconds=0.01, retries=3, concurrency=2)
DIALECTS = ["vllm", "sglang", "llama_cpp"]


def client_of(handler, config=QUICK):
    return Client("http://server:1/v1/", config, transport=httpx.MockTransport(handler))


def test_what_may_pass_is_tried_again():
    answers = iter([httpx.Response(503), httpx.ConnectError("refused"), httpx.Response(200, json={"ok": 1})])

    def handler(request):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert client_of(handler).get("/x") == {"ok": 1}


def test_the_error_names_address_status_and_what_to_do():
    with pytest.raises(LimbeckError, match=r"http://server:1/x: status 503 .*4 times\. Check that the server runs"):
        client_of(lambda _: httpx.Response(503, text="busy")).get("/x")
    with pytest.raises(LimbeckError, match=r"http://server:1/x: status 401 .*api_key_variable"):
        client_of(lambda _: httpx.Response(401, text="who")).get("/x")


def test_a_refusal_is_not_tried_again():
    calls = []
    with pytest.raises(LimbeckError, match="status 400"):
        client_of(lambda request: calls.append(request) or httpx.Response(400, text="too long")).post("/x", {})
    assert len(calls) == 1


def test_retry_after_is_honoured():
    waits = []
    client = client_of(
        lambda _: httpx.Response(429, headers={"Retry-After": "0.02"}) if not waits else httpx.Response(200, json={}),
        ClientConfig(backoff_seconds=5.0, max_backoff_seconds=5.0),
    )
    client._closed.wait = lambda seconds: waits.append(seconds) and False
    client.get("/x")
    assert waits == [0.02]
    assert retry_after_seconds("soon") is None
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_waits_grow_and_differ():
    client = client_of(lambda _: httpx.Response(503), ClientConfig(backoff_seconds=1.0, max_backoff_seconds=8.0))
    for attempt, longest in enumerate([1.0, 2.0, 4.0, 8.0, 8.0]):
        pauses = [client._pause(attempt, None) for _ in range(50)]
        assert all(longest / 2 <= pause <= longest for pause in pauses)
        assert len(set(pauses)) > 1


def test_an_address_is_checked():
    assert server_root("http://host:8000/v1/") == "http://host:8000"
    with pytest.raises(ConfigError, match="expected http"):
        server_root("localhost:8000")


def test_concurrency_is_bounded_and_order_kept():
    with ModelServer() as server:
        client = Client(server.url, QUICK)
        results = list(map_concurrently(lambda _: client.get("/v1/models"), range(12), 2))
    assert [item for item, _ in results] == list(range(12))
    assert server.most_under_way <= 2


@pytest.mark.parametrize("dialect", DIALECTS)
def test_detects_the_dialect(dialect):
    with ModelServer(dialect) as server:
        assert detect(Client(server.url, QUICK)) == dialect


@pytest.mark.parametrize("dialect", DIALECTS)
def test_scores_equal_the_live_model(dialect):
    """float32 on both sides and decimal text in between: equal to 1e-5 nats."""
    tokens = np.random.default_rng(0).integers(4, 50, 14).tolist()
    with ModelServer(dialect) as server:
        teacher = connect(Client(server.url, QUICK), None, "auto", 6, 56)
        (rows,) = teacher.score([Query(tokens, [3, 4, 9])])
        targets = to_targets(rows, 6, 56, CPU)
        expected = server.log_probs(tokens)[[2, 3, 8]]
    values, _ = expected.topk(6)
    torch.testing.assert_close(targets.log_probs, values, rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.log_probs, expected.gather(1, targets.ids), rtol=0, atol=1e-5)
    mass = targets.log_probs.exp().sum(1) + targets.log_tail.exp()
    torch.testing.assert_close(mass, torch.ones(3), rtol=0, atol=1e-6)


def test_vllm_is_sent_no_more_than_needed():
    with ModelServer("vllm") as server:
        teacher = ServedTeacher(Client(server.url, QUICK), "tiny", "vllm", 3, 56)
        teacher.score([Query(list(range(4, 20)), [2, 5])])
    ((path, body),) = server.requests
    assert path == "/v1/completions"
    assert body == {
        "model": "tiny",
        "prompt": [4, 5, 6, 7, 8, 9],
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 3,
    }


# After vLLM's CompletionResponse (v0.11): null for the first position, then token ids as text to logprob, rank and
# decoded token; the prompt's own token stands first, also where it is none of the top ones.
VLLM_ANSWER = """{"id":"cmpl-4f1c","object":"text_completion","created":1760000000,"model":"Qwen/Qwen3-0.6B","choices":[
{"index":0,"text":" Paris","logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,
"prompt_logprobs":[null,
{"3838":{"logprob":-9.25,"rank":412,"decoded_token":"What"},"11":{"logprob":-1.5,"rank":1,"decoded_token":","},
"13":{"logprob":-2.0,"rank":2,"decoded_token":"."}},
{"374":{"logprob":-0.25,"rank":1,"decoded_token":" is"},"594":{"logprob":-2.5,"rank":2,"decoded_token":"'s"}}],
"prompt_token_ids":null}],"service_tier":null,"system_fingerprint":null,
"usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1,"prompt_tokens_details":null},
"kv_transfer_params":null}"""


def test_reads_a_recorded_answer_of_vllm():
    client = client_of(lambda _: httpx.Response(200, json=json.loads(VLLM_ANSWER)))
    teacher = ServedTeacher(client, "Qwen/Qwen3-0.6B", "vllm", 2, 151669)
    (rows,) = teacher.score([Query([9707, 3838, 374], [1, 2])])
    assert rows[0][:2] == [(11, -1.5), (13, -2.0)]
    targets = to_targets(rows, 2, 56, CPU)
    assert targets.ids.tolist() == [[11, 13], [374, 594]]
    torch.testing.assert_close(targets.log_tail.exp(), 1 - targets.log_probs.exp().sum(1), rtol=0, atol=1e-6)


def test_another_server_is_refused():
    teacher = ServedTeacher(client_of(lambda _: httpx.Response(200, json={"choices": [{}]})), "m", "vllm", 2, 56)
    with pytest.raises(LimbeckError, match=r"no choices\.0\.prompt_logprobs"):
        teacher.score([Query([1, 2], [1])])
    short = ServedTeacher(
        client_of(lambda _: httpx.Response(200, json={"choices": [{"prompt_logprobs": [None]}]})), "m", "vllm", 2, 56
    )
    with pytest.raises(PairError, match="1 positions for 2 tokens"):
        short.score([Query([1, 2], [1])])


def test_padding_of_the_servers_vocabulary_falls_to_the_tail():
    answer = {"choices": [{"prompt_logprobs": [None, {"60": {"logprob": -0.5}, "3": {"logprob": -1.5}}]}]}
    teacher = ServedTeacher(client_of(lambda _: httpx.Response(200, json=answer)), "m", "vllm", 2, 56)
    (rows,) = teacher.score([Query([1, 2], [1])])
    targets = to_targets(rows, 2, 56, CPU)
    assert targets.ids.tolist() == [[3]]
    assert targets.log_tail.exp().item() == pytest.approx(1 - np.exp(-1.5), abs=1e-6)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_distillation_from_a_server_is_distillation_from_the_live_teacher(layout):
    """With every entry asked for, the loss of a step equals the live teacher's."""
    changes = {"training.layout": layout, "student.model": "tiny-student"}
    with ModelServer("vllm") as server:
        served = one_step(run_config({**changes, "teacher.server": server.url, "teacher.top_n": 56}))
    live = one_step(run_config({**changes, "teacher.model": "tiny-teacher"}))
    assert served.kd == pytest.approx(live.kd, rel=1e-4)
    assert served.ce == pytest.approx(live.ce, rel=1e-6)


def test_a_server_scores_rollouts_as_the_live_teacher_does(tmp_path):
    """On-policy steps with every entry asked for: the same rollouts, the same divergence."""
    changes = {
        "student.model": "tiny-student",
        "training.max_steps": 2,
        "on_policy": {"start_fraction": 0.0, "max_new_tokens": 6},
    }
    with ModelServer("vllm") as server:
        served = run_config({**changes, "teacher.server": server.url, "teacher.top_n": 56})
        train.run(served, tmp_path / "served")
    train.run(run_config({**changes, "teacher.model": "tiny-teacher"}), tmp_path / "live")
    for one, other in zip(metrics_of(tmp_path / "served"), metrics_of(tmp_path / "live"), strict=True):
        assert one["on_policy"] == other["on_policy"] == 1.0
        assert one["rollout_tokens"] == other["rollout_tokens"] > 0
        assert one["kd_term"] == pytest.approx(other["kd_term"], rel=1e-3)


@pytest.mark.parametrize("dialect", ["vllm", "llama_cpp"])
def test_a_server_with_another_tokenizer_is_refused(dialect):
    with ModelServer(dialect) as server:
        teacher = connect(Client(server.url, QUICK), None, "auto", 6, 56)
        check_tokenizer(teacher, load_tokenizer("tiny-student"))
        server.tokenizer.add_tokens(["what"])
        with pytest.raises(PairError, match=r"one tokenizer\. Serve a teacher of the same family"):
            check_tokenizer(teacher, load_tokenizer("tiny-student"))


def test_several_teachers_add_up():
    both = {
        "student.model": "tiny-student",
        "loss.kd_ratio": 1.0,
        "teacher": {"model": "tiny-teacher", "weight": 0.25, "others": [{"model": "tiny-student", "weight": 0.5}]},
    }
    one = one_step(run_config({"student.model": "tiny-student", "loss.kd_ratio": 1.0, "teacher.model": "tiny-teacher"}))
    mixed = one_step(run_config(both))
    # The second teacher is the student itself: its divergence is 0.
    assert mixed.kd == pytest.approx(0.25 * one.kd, rel=1e-4)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(mixed.gradients[name], 0.25 * gradient, rtol=1e-3, atol=1e-6)


def test_no_teacher_is_still_none():
    assert load_teacher(run_config(), Ranks(0, 1, CPU)) is None


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"server": "host"}, "expected http"),
        ({"server": "http://h:1", "model": "tiny-teacher"}, "not both"),
        ({"others": [{"model": "tiny-teacher"}]}, "neither model, cache nor server"),
        ({"model": "tiny-teacher", "others": [{"weight": 2.0}]}, "every entry of others"),
        ({"model": "tiny-teacher", "others": [{"modl": "x"}]}, "did you mean 'model'"),
    ],
)
def test_bad_teachers_are_refused(teacher, message):
    with pytest.raises(ConfigError, match=message):
        run_config({"teacher": teacher})


def test_a_server_that_comes_back_costs_nothing():
    with ModelServer("vllm", faults=[503, 500, None]) as server:
        start = time.monotonic()
        assert Client(server.url, QUICK).only_model() == "tiny"
        assert time.monotonic() - start < 5
