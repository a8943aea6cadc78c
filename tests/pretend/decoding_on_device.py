"""Texts written on the pretend device: those of a CPU, and hardly a wait among them."""

import pytest
import torch
from pretend.device import COUNTS
from tiny_runs import save_model

from limbeck.engine.complete import complete
from limbeck.engine.sampling import SamplingConfig
from limbeck.models.load import load_model

PROMPTS = [[1, 16 + i, 17, 20, 21 + i] + [18] * (i % 4) for i in range(12)]
WAYS = {
    "greedy": SamplingConfig(max_new_tokens=40, batch_size=8),
    "drawn": SamplingConfig(max_new_tokens=40, temperature=0.8, num_samples=2, batch_size=8),
    "nucleus": SamplingConfig(max_new_tokens=24, temperature=1.1, top_p=0.7, batch_size=16),
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def name(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return save_model(folder, kind=request.param, num_heads=4, kv_heads=2, sharpness=30.0)


@pytest.mark.parametrize("way", WAYS)
def test_texts_are_those_of_a_cpu(name, way):
    found = complete(load_model(name, torch.float32, device="cuda"), PROMPTS, WAYS[way], [2, 5], 3, log_probs=True)
    expected = complete(load_model(name, torch.float32, device="cpu"), PROMPTS, WAYS[way], [2, 5], 3, log_probs=True)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.token_ids, one.stopped) == (other.token_ids, other.stopped)
            assert len(one.log_probs) == len(one.token_ids)
            if WAYS[way].temperature in (0.0, 1.0):
                assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_wait_in_sixteen_tokens(name, rows):
    model, config = load_model(name, device="cuda"), SamplingConfig(max_new_tokens=160, batch_size=rows)
    prompts = PROMPTS[:rows]
    complete(model, prompts, SamplingConfig(max_new_tokens=16, batch_size=rows), [55])
    COUNTS.clear()
    texts = complete(model, prompts, config, [55])
    longest = max(len(one.token_ids) for row in texts for one in row)
    assert longest == 160
    # Beside the looks at what is over: taking the texts out at the end.
    assert COUNTS.total_waits <= longest / 16 + 6, COUNTS.waits
