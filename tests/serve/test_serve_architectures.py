"""Models that the lean decoder does not run are served by transformers' own forward, through the same endpoints."""

import pytest
import torch
from limbeck_server import RunningServer
from transformers import Lfm2Config, Lfm2ForCausalLM, MixtralConfig, MixtralForCausalLM

from limbeck.models.load import load_tokenizer

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
MODELS = {
    "a mixture": lambda size: MixtralForCausalLM(MixtralConfig(**SHAPE, vocab_size=size, num_local_experts=4)),
    "a hybrid": lambda size: Lfm2ForCausalLM(
        Lfm2Config(**SHAPE, vocab_size=size, layer_types=["conv", "full_attention", "conv"])
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_texts_are_those_of_the_model(name, tmp_path):
    torch.manual_seed(0)
    tokenizer = load_tokenizer("tiny-student")
    model = MODELS[name](len(tokenizer)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prefix, items, labels = [5, 9, 31, 7, 12], [[8, 20], [41]], [3, 30]
    with RunningServer(str(tmp_path)) as server:
        scored = server.post(
            "/v1/score", {"query": prefix, "items": items, "label_token_ids": labels, "apply_softmax": True}
        ).json()
        body = {"model": str(tmp_path), "prompt": prefix, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        text = server.post("/v1/completions", body).json()["choices"][0]
    with torch.no_grad():
        for item, found in zip(items, scored["scores"], strict=True):
            logits = model(torch.tensor([prefix + item])).logits[0, -1, labels]
            assert found == pytest.approx(logits.softmax(-1).tolist(), abs=2e-5)
        tokens = list(prefix)
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert text["text"] == tokenizer.decode(tokens[len(prefix) :], skip_special_tokens=True)
