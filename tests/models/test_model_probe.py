"""Models are asked: what the probe finds holds for models of other sizes and weights than its own."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from architectures import FAMILIES, build

from limbeck.errors import ModelError
from limbeck.models import probe
from limbeck.models.anatomy import head_of, hidden_rows, hidden_states
from limbeck.models.attention import PACKED_ATTENTION, packed_attention
from limbeck.models.layouts import padded_groups
from limbeck.models.miniature import miniatures
from limbeck.models.parts import LogitForm

LENGTHS = [37, 5, 21, 60]
SAMPLE = [
    *("Llama", "Gemma 2", "gpt-oss", "Mistral", "Cohere", "StableLM", "Phi-3 longrope", "GPT-2", "Llama 4"),
    *("Qwen3-MoE", "DeepSeek-V3", "Qwen3-Next", "LFM2", "Granite 4", "RecurrentGemma", "Gemma 3, vision", "Qwen3-VL"),
]
ALL = [pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.slow]) for name in FAMILIES]


def sequences(seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (length,), generator=generator) for length in LENGTHS]


def own_log_probs(model, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of each sequence alone, as transformers gives them with its eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return [model(input_ids=one[None]).logits[0].log_softmax(-1) for one in ids]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The questions that are really put, with nothing known before."""
    questions: list[str] = []
    examine = probe._examine
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probe, "_answers", {})
    monkeypatch.setattr(probe, "_examine", lambda kind, *rest: questions.append(kind.__name__) or examine(kind, *rest))
    return questions


@pytest.mark.parametrize("name", ALL)
def test_a_packed_batch_has_the_loss_of_each_sequence_alone(name):
    model, ids = build(name, 96), sequences()
    want = torch.cat([p[:-1].gather(1, i[1:, None])[:, 0] for p, i in zip(own_log_probs(model, ids), ids, strict=True)])
    model.set_attn_implementation(PACKED_ATTENTION if probe.ask(model).way == "packed" else probe.ask(model).attention)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    rows = torch.nonzero(torch.cat([torch.arange(n) < n - 1 for n in LENGTHS]))[:, 0]
    with torch.no_grad():
        hidden, _ = hidden_rows(model, torch.cat(ids)[None], positions, rows, LENGTHS)
        log_probs = head_of(model).logits(hidden).log_softmax(-1)
    got = log_probs.gather(1, torch.cat([one[1:] for one in ids])[:, None])[:, 0]
    assert torch.allclose(got, want, atol=2e-4)
    assert float(got.mean()) == pytest.approx(float(want.mean()), rel=1e-5)


@pytest.mark.parametrize("name", ["Gemma 2", "Qwen3.5", "BLOOM"])
def test_a_padded_batch_is_right(name):
    model, ids = build(name, 96), sequences()
    want = own_log_probs(model, ids)
    model.set_attn_implementation(probe.ask(model).attention)
    rows = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    positions = torch.arange(max(LENGTHS)).expand_as(rows)
    with torch.no_grad():
        found = head_of(model).logits(hidden_states(model, rows, positions)).log_softmax(-1)
    for mine, theirs, length in zip(found, want, LENGTHS, strict=True):
        assert torch.allclose(mine[:length], theirs, atol=2e-4)


def test_a_model_that_reads_masks_is_not_packed():
    model, ids = build("Mistral", 96), sequences()
    want = torch.cat(own_log_probs(model, ids))
    model.set_attn_implementation("sdpa")
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with torch.no_grad():
        hidden = hidden_states(model, torch.cat(ids)[None], positions, LENGTHS)[0]
    assert torch.allclose(head_of(model).logits(hidden).log_softmax(-1), want, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("Llama", LogitForm()),
        ("Granite", LogitForm("logits_scaling", True)),
        ("Cohere", LogitForm("logit_scale")),
        ("Gemma 2", LogitForm(cap_field="final_logit_softcapping")),
        ("RecurrentGemma", LogitForm(cap_field="logits_soft_cap")),
    ],
)
def test_what_the_logits_are_is_found(name, form):
    assert probe.ask(build(name, 96)).form == form


def test_a_model_that_looks_ahead_is_refused():
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ModelError, match="BertLMHeadModel: its tokens see what comes after them"):
        probe.ask_config(transformers.BertLMHeadModel, config)


def test_an_answer_is_found_once_and_kept_on_disk(asked, monkeypatch, tmp_path):
    model = build("Qwen3", 96)
    first = probe.ask(model)
    assert probe.ask(build("Qwen3", 96, seed=1)) == first and asked == ["Qwen3ForCausalLM"]
    [file] = (tmp_path / "limbeck/probes").glob("*.json")
    monkeypatch.setattr(probe, "_answers", {})
    assert probe.ask_config(type(model), model.config) == first and len(asked) == 1
    file.write_text(json.dumps(json.loads(file.read_text()))[:-5])
    monkeypatch.setattr(probe, "_answers", {})
    assert probe.ask_config(type(model), model.config) == first and len(asked) == 2
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    probe.ask_config(type(model), model.config)
    assert len(asked) == 3


def test_other_ways_are_asked_the_same(asked):
    model = build("Qwen3.5", 96)
    assert probe.agrees(model, "plain", probe.plain_logits) == (True, "")
    assert not probe.agrees(model, "shifted", lambda m, s: [x + 1 for x in probe.plain_logits(m, s)]).agrees

    def fails(small, ids):
        raise ValueError("no such layer")

    assert probe.agrees(model, "fails", fails) == (False, "no such layer")


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "both"])
def test_packed_attention_is_its_formula(window, extra):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    softcap = 1.5 if extra in ("softcap", "both") else None
    sinks = torch.randn(4) if extra in ("sinks", "both") else None
    out, _ = packed_attention(
        torch.nn.Identity(), query, key, value, None, scaling=0.7, sequence_lengths=[7, 5], sliding_window=window,
        softcap=softcap, s_aux=sinks, cu_seq_lens_q=None, position_ids=torch.arange(12)
    )  # fmt: skip
    owner = torch.tensor([0] * 7 + [1] * 5)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    seen = (owner[:, None] == owner) & (distance >= 0) & (distance < (window or 12))
    logits = 0.7 * query @ key.repeat_interleave(2, 1).transpose(2, 3)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    weights = logits.exp() * seen
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[None, :, None, None])
    assert torch.allclose(out, (weights / total @ value.repeat_interleave(2, 1)).transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("asked_for", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"block_indices": [1], "temperature": 2.0}, "block_indices, temperature"),
        ({"is_causal": False}, "is_causal=False"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "attention_mask"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_packed_attention_drops_no_keyword(asked_for, message):
    states = [torch.zeros(1, 2, 3, 4)] * 3
    with pytest.raises(ModelError, match=f"Identity asks for {message}, which it does not honour"):
        packed_attention(torch.nn.Identity(), *states, **{"attention_mask": None} | asked_for)


def test_groups_of_like_length_waste_a_fifth_at_most():
    lengths = torch.randint(1, 500, (80,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = padded_groups(lengths)
    assert sorted(number for group in groups for number in group) == list(range(80))
    for group in groups:
        padded = len(group) * max(lengths[number] for number in group)
        assert padded <= 1.25 * sum(lengths[number] for number in group)
    assert len(groups) < 20


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("Mixtral", "packed"),
        ("DeepseekV3", "packed"),
        ("Gemma2", "packed"),
        ("GptOss", "packed"),
        ("Qwen3Next", "padded"),
    ],
)
def test_models_of_any_size_are_tried_in_small(kind, way):
    config = getattr(transformers, kind + "Config")()
    before = config.to_dict()
    model = miniatures(getattr(transformers, kind + "ForCausalLM"), config)[0]()
    assert sum(parameter.numel() for parameter in model.parameters()) < 50e6
    assert config.to_dict() == before
    assert probe.ask_config(type(model), config).way == way
