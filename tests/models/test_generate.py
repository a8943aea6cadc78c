"""The batched sampler against transformers' own greedy decoding, and against itself in other batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from limbeck.errors import ConfigError
from limbeck.models.attention import PACKED_ATTENTION
from limbeck.models.cache import Source, empty_cache, gather_rows, shrink
from limbeck.models.generate import SamplingConfig, generate
from limbeck.models.sampling import choose_tokens

VOCABULARY, PAD = 40, 0
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 17, 1, 9, 9, 30, 5, 12, 2, 8, 21]
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def reference_greedy(model: nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    """One prompt alone through transformers' generate."""
    input_ids = torch.tensor([prompt])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return output[0, len(prompt) :].tolist()


def models() -> dict[str, nn.Module]:
    torch.manual_seed(2)
    gpt2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "mistral with a sliding window": MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16)),
        "llama, eager attention": LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager")),
        "gpt2": GPT2LMHeadModel(gpt2),
    }


@pytest.mark.parametrize("name", list(models()))
def test_greedy_equals_transformers(name: str, prompts: list[list[int]]) -> None:
    model = models()[name].eval()
    expected = [reference_greedy(model, prompt, 24) for prompt in prompts]
    stop_ids = [expected[0][3], expected[4][20]]
    ours = generate(model, prompts, SamplingConfig(max_new_tokens=24, batch_size=4), stop_ids, PAD)
    for tokens, (completion,) in zip(expected, ours, strict=True):
        text = list(itertools.takewhile(lambda token: token not in stop_ids, tokens))
        assert completion.token_ids == tokens[: len(text) + 1]
        assert completion.stopped == (len(text) < 24)
        assert completion.text_ids == text
    assert {completion.stopped for (completion,) in ours} == {True, False}, "both ways to end must occur"


def test_completions_do_not_depend_on_the_batch(llama: nn.Module, prompts: list[list[int]]) -> None:
    def sample(chosen: list[list[int]], batch_size: int, max_new_tokens: int = 20) -> list[list[list[int]]]:
        config = SamplingConfig(
            max_new_tokens=max_new_tokens, temperature=1.0, top_p=0.9, num_samples=3, batch_size=batch_size, seed=7
        )
        return [[c.token_ids for c in samples] for samples in generate(llama, chosen, config, [5], PAD)]

    one_by_one = sample(prompts, 1)
    assert sample(prompts, 5) == one_by_one
    assert sample(prompts, 64) == one_by_one
    assert sample(prompts[:4], 64) == one_by_one[:4]
    assert [[c[:6] for c in samples] for samples in one_by_one] == sample(prompts, 16, max_new_tokens=6)
    assert all(a != b for samples in one_by_one for a, b in itertools.combinations(samples, 2) if len(a) > 4)


def test_lean_step_is_the_step_of_transformers(
    llama: nn.Module, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same tokens with either, padded and not; and the lean one is what runs."""
    config = SamplingConfig(max_new_tokens=20, temperature=0.9, num_samples=2, batch_size=8, seed=3)
    forwards: list[int] = []
    hook = llama.register_forward_pre_hook(
        lambda _, __, kw: forwards.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    for chosen in (prompts, [prompts[3], prompts[4]]):
        lean = generate(llama, chosen, config, [5], PAD)
        assert min(forwards) >= min(map(len, chosen)) and len(forwards) < 20
        with monkeypatch.context() as patch:
            patch.setattr("limbeck.models.generate._is_lean", lambda _: False)
            assert generate(llama, chosen, config, [5], PAD) == lean
        forwards.clear()
    hook.remove()


def test_seed_changes_the_draws(llama: nn.Module, prompts: list[list[int]]) -> None:
    outputs = [
        generate(llama, prompts[:3], SamplingConfig(max_new_tokens=12, temperature=1.0, seed=seed), [], PAD)
        for seed in (0, 0, 1)
    ]
    assert outputs[0] == outputs[1] != outputs[2]


def test_prompt_is_prefilled_once_for_its_samples(llama: nn.Module, prompts: list[list[int]]) -> None:
    prefilled = []

    def record(_: nn.Module, __: tuple, kwargs: dict) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            prefilled.append(tuple(kwargs["input_ids"].shape))

    hook = llama.register_forward_pre_hook(record, with_kwargs=True)
    config = SamplingConfig(max_new_tokens=4, temperature=1.0, num_samples=8, batch_size=16)
    generate(llama, [prompts[1], prompts[3]], config, [], PAD)
    hook.remove()
    assert prefilled == [(2, 17)]


def test_finished_rows_leave_the_batch(llama: nn.Module, prompts: list[list[int]]) -> None:
    rows: list[int] = []
    hook = llama.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    stop_ids = list(range(1, VOCABULARY, 4))
    outputs = generate(llama, prompts, SamplingConfig(max_new_tokens=60, batch_size=11), stop_ids, PAD)
    hook.remove()
    needed = sum(len(completion.token_ids) for (completion,) in outputs)
    assert sum(rows) == needed, "one row of the head's input for every token that is kept"


def test_progress_counts_every_completion(llama: nn.Module, prompts: list[list[int]]) -> None:
    ended: list[int] = []
    config = SamplingConfig(max_new_tokens=9, temperature=1.0, num_samples=2, batch_size=3)
    generate(llama, prompts, config, [5], PAD, advance=ended.append)
    assert sum(ended) == 2 * len(prompts)
    assert min(ended) > 0


def test_context_limits_a_completion(llama: nn.Module) -> None:
    prompt = [3] * 120
    ((completion,),) = generate(llama, [prompt], SamplingConfig(max_new_tokens=50), [], PAD)
    assert len(completion.token_ids) == 8
    assert not completion.stopped
    with pytest.raises(ConfigError, match="prompt 1 has 128 tokens"):
        generate(llama, [[3], [3] * 128], SamplingConfig(), [], PAD)
    with pytest.raises(ConfigError, match="prompt 0 has 0 tokens"):
        generate(llama, [[]], SamplingConfig(), [], PAD)


def test_model_comes_back_as_it_was(llama: nn.Module, prompts: list[list[int]]) -> None:
    expected = generate(llama, prompts[:3], SamplingConfig(max_new_tokens=8), [], PAD)
    llama.train()
    llama.config._attn_implementation = PACKED_ATTENTION
    try:
        assert generate(llama, prompts[:3], SamplingConfig(max_new_tokens=8), [], PAD) == expected
        assert llama.training
        assert llama.config._attn_implementation == PACKED_ATTENTION
    finally:
        llama.eval()
        llama.config._attn_implementation = "sdpa"


def test_no_prompts_give_no_completions(llama: nn.Module) -> None:
    assert generate(llama, [], SamplingConfig(), [], PAD) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"num_samples": 0},
        {"batch_size": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"num_samples": 2},
        {"seed": -1},
    ],
)
def test_bad_config_is_refused(fields: dict) -> None:
    with pytest.raises(ConfigError):
        SamplingConfig(**fields)


@pytest.mark.parametrize(("vocabulary", "top_p"), [(6, 1.0), (6, 0.7), (2000, 0.95)])
def test_choice_follows_the_distribution(vocabulary: int, top_p: float) -> None:
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(3))
    draws = 40_000
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    chosen = choose_tokens(logits.expand(draws, -1), uniforms, 1.5, top_p)
    observed = torch.bincount(chosen, minlength=vocabulary) / draws
    expected = torch.softmax(logits.double() / 1.5, -1)
    ranked, order = expected.sort(descending=True)
    outside = order[(ranked.cumsum(0) - ranked) >= top_p]
    expected[outside] = 0
    assert observed[outside].sum() == 0
    torch.testing.assert_close(observed.double(), expected / expected.sum(), atol=2 / draws, rtol=0)


def test_choice_never_takes_an_impossible_token() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(3, -1)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    for top_p in (1.0, 0.999):
        assert set(choose_tokens(logits, uniforms, 1.0, top_p).tolist()) == {1, 3}


def test_shrunk_cache_keeps_its_rows_and_grows_again() -> None:
    cache = empty_cache()
    states = torch.randn(4, 2, 7, 4)
    cache.update(states, -states, 0)
    shrink(cache, [0], [3], 3, 2)
    added = torch.randn(3, 2, 100, 4)
    keys, values = cache.update(added, -added, 0)
    assert torch.equal(keys, torch.cat([states[[3, 1, 2], :, 2:], added], dim=2))
    assert torch.equal(values, -keys)
    assert cache.get_seq_length() == 105


def test_gathered_rows_keep_their_columns() -> None:
    caches = []
    for rows, columns in ((2, 3), (3, 5)):
        caches.append(empty_cache())
        for layer in range(2):
            states = torch.randn(rows, 1, columns, 4)
            caches[-1].update(states[:, :, :-1], -states[:, :, :-1], layer)
            caches[-1].update(states[:, :, -1:], -states[:, :, -1:], layer)
    merged = gather_rows([Source(caches[0], torch.tensor([1, 1]), 2), Source(caches[1], torch.tensor([2, 0]), 4)])
    for layer in range(2):
        keys, old = merged.layers[layer].keys, [cache.layers[layer].keys for cache in caches]
        assert keys.shape == (4, 1, 4, 4)
        assert torch.equal(keys[:2, :, 2:], old[0][[1, 1]][:, :, -2:])
        assert torch.equal(keys[2:], old[1][[2, 0]][:, :, -4:])
        assert keys[:2, :, :2].abs().max() == 0
        assert torch.equal(merged.layers[layer].values, -keys)
