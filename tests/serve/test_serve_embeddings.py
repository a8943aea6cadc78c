"""Vectors of texts, by sentence-transformers' files, against a plain forward pass; and who has none."""

import base64
import json

import numpy as np
import openai
import pytest
import torch
from limbeck_server import RunningServer
from written_models import save_exportable

from limbeck.engine.decoder import Decoder
from limbeck.engine.embedding import Embedding, Pooling, pooling_of
from limbeck.engine.weights import weights_of
from limbeck.errors import ModelError
from limbeck.models.load import load_model, load_tokenizer

TEXTS = ["the her at", "a", "there " * 60]


def write_modules(directory, pooling, names=("Transformer", "Pooling", "Normalize"), **prompts):
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "3_Dense"}
    kind = "sentence_transformers.models."
    modules = [{"idx": n, "name": str(n), "path": paths[name], "type": kind + name} for n, name in enumerate(names)]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling}))
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_exportable(directory, max_position_embeddings=512)
    return directory


def by_transformers(model, texts, mode, is_normalised):
    tokenizer, whole = load_tokenizer(str(model)), load_model(str(model))
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            states = whole.model(ids).last_hidden_state[0]
        found.append(states.mean(0) if mode == "mean" else states[-1])
    vectors = torch.stack(found)
    return vectors / vectors.norm(dim=1, keepdim=True) if is_normalised else vectors


@pytest.mark.parametrize("names", [("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize")])
@pytest.mark.parametrize("flags", [{"pooling_mode_mean_tokens": True}, {"pooling_mode_lasttoken": True}])
def test_vectors_are_those_of_a_plain_forward_pass(model, names, flags):
    (flag,) = flags
    write_modules(model, {"pooling_mode_cls_token": False, **flags}, names)
    expected = by_transformers(model, TEXTS, "mean" if "mean" in flag else "last", "Normalize" in names)
    with RunningServer(str(model), name="m", batch_tokens=64) as server:  # so that texts are read in pieces
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        answer = client.embeddings.create(model="m", input=TEXTS, dimensions=64)
        one = server.post("/v1/embeddings", {"input": TEXTS[0]}).json()
        ids = server.post("/tokenize", {"prompt": TEXTS[0]}).json()["tokens"]
        again = server.post("/embeddings", {"input": [ids], "encoding_format": "base64"}).json()
    found = torch.tensor([entry.embedding for entry in answer.data])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert [entry.index for entry in answer.data] == [0, 1, 2] and answer.usage.prompt_tokens > 60
    torch.testing.assert_close(torch.tensor(one["data"][0]["embedding"]), expected[0], rtol=0, atol=2e-5)
    decoded = np.frombuffer(base64.b64decode(again["data"][0]["embedding"]), "<f4")
    torch.testing.assert_close(torch.tensor(decoded), expected[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", ["mean", "last"])
@pytest.mark.parametrize("tokens", [1, 3, 7, 100])
def test_pieces_make_no_difference(model, mode, tokens):
    decoder = Decoder(weights_of(load_model(str(model))))
    texts = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [4] * 20, [9, 8]]
    whole = Embedding(decoder, texts, Pooling(mode, True), 1000).step()
    pieces, found, steps = Embedding(decoder, texts, Pooling(mode, True), tokens), None, 0
    while found is None:
        found, steps = pieces.step(), steps + 1
    assert steps == -(-31 // tokens)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_a_default_prompt_stands_in_front(model):
    write_modules(model, {"pooling_mode": "mean"}, default_prompt_name="query", prompts={"query": "the her "})
    expected = by_transformers(model, ["the her at"], "mean", True)
    with RunningServer(str(model)) as server:
        answer = server.post("/v1/embeddings", {"input": "at"}).json()
        torch.testing.assert_close(torch.tensor(answer["data"][0]["embedding"]), expected[0], rtol=0, atol=2e-5)
        for body, told in [
            ({"input": []}, "1 to"),
            ({"input": "a", "dimensions": 8}, "dimensions"),
            ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
            ({"input": "the " * 2000}, "context length"),
            ({"input": {"a": 1}}, "input"),
        ]:
            refused = server.post("/v1/embeddings", body)
            assert refused.status_code in (400, 422) and told in refused.json()["error"]["message"], refused.text


@pytest.mark.parametrize(
    ("pooling", "names", "told"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, ("Transformer", "Pooling"), "mean_tokens"),
        ({"pooling_mode_max_tokens": True}, ("Transformer", "Pooling"), "known are mean_tokens"),
        ({"pooling_mode": "mean"}, ("Transformer", "Pooling", "Dense"), "Dense"),
        ({"pooling_mode": "mean"}, ("Transformer",), "Pooling"),
    ],
)
def test_what_is_not_known_is_refused_by_name(model, pooling, names, told):
    write_modules(model, pooling, names)
    with pytest.raises(ModelError, match=told):
        pooling_of(str(model), Decoder(weights_of(load_model(str(model)))))


def test_a_model_without_vectors_says_so():
    with RunningServer() as server:
        answer = server.post("/v1/embeddings", {"input": "12"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "model_not_supported" and "no embeddings" in error["message"]
