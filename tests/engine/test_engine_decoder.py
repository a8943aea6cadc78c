"""The lean decoder against transformers: every family, every position, dense and quantised, in one segment or many."""

import itertools

import pytest
import torch
from made_models import made_model
from peft import LoraConfig, get_peft_model
from written_models import schemes_for, write_quantized

from limbeck.engine.attention import attend
from limbeck.engine.backends import load_decoder, unsupported
from limbeck.engine.decoder import Decoder, KeyValues, Segment
from limbeck.engine.int8 import Int8Linear
from limbeck.engine.weights import weights_of
from limbeck.errors import ModelError
from limbeck.models.load import load_model
from limbeck.models.schemes import SCHEMES, scheme_of

FAMILIES = ["llama", "llama-tied", "llama-biased", "qwen2", "qwen3", "mistral", "gemma", "gemma3"]
PROMPT = torch.randint(0, 96, (50,), generator=torch.Generator().manual_seed(3)).tolist()


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def all_logits(decoder, segments):
    hidden = decoder.run(segments, every_row=True)
    return decoder.label_logits(hidden, torch.arange(decoder.vocab_size))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family):
    model = made_model(family)
    ours = all_logits(Decoder(weights_of(model)), [Segment(PROMPT)])
    torch.testing.assert_close(ours, logits_of(model, PROMPT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cuts", [(1,), (16, 32), (7, 8, 30), (49,)])
def test_a_prompt_in_pieces_equals_the_prompt(family, cuts):
    """Pieces that leave their keys, in one pass or one pass each; the last piece does not."""
    model = made_model(family)
    decoder = Decoder(weights_of(model))
    theirs = logits_of(model, PROMPT)
    bounds = [0, *cuts, len(PROMPT)]
    for is_one_pass in (True, False):
        prefix = KeyValues(decoder, cuts[-1])
        pieces = [
            Segment(PROMPT[start:stop], prefix, start, stop != len(PROMPT))
            for start, stop in itertools.pairwise(bounds)
        ]
        groups = [pieces] if is_one_pass else [[piece] for piece in pieces]
        ours = torch.cat([all_logits(decoder, group) for group in groups])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_do_not_see_each_other(family):
    """Different lengths and prefixes in one row; order of the results is that of the segments."""
    model = made_model(family)
    decoder = Decoder(weights_of(model))
    prefix = KeyValues(decoder, 20)
    segments = [
        Segment(PROMPT[:20], prefix, 0, True),
        Segment(PROMPT[30:37], prefix, 20),
        Segment([5], prefix, 20),
        Segment(PROMPT[20:27], prefix, 20),
        Segment(PROMPT[3:9]),
        Segment(PROMPT[40:47], prefix, 20),
    ]
    hidden = decoder.run(segments)
    for segment, row in zip(segments, hidden, strict=True):
        whole = PROMPT[: segment.start] + list(segment.tokens)
        ours = decoder.label_logits(row[None], torch.arange(96))[0]
        torch.testing.assert_close(ours, logits_of(model, whole)[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["w8a8", "w4a16", "fp8-dynamic", "fp8-static"])
@pytest.mark.parametrize("family", ["llama-biased", "qwen3"])
def test_quantized_directories(family, name, tmp_path):
    """As the dense model that simulates the scheme; int8 products differ from it by single roundings of inputs."""
    scheme = scheme_of("w4a16", 16) if name == "w4a16" else SCHEMES[name]
    model = made_model(family)
    write_quantized(tmp_path, model, schemes_for(model, scheme))
    theirs = logits_of(load_model(str(tmp_path)), PROMPT)
    for precision in ("float32", "auto"):
        decoder = load_decoder(str(tmp_path), precision)
        ours = all_logits(decoder, [Segment(PROMPT)])
        assert isinstance(decoder.weights.blocks[0].qkv, Int8Linear) == (name == "w8a8" and precision == "auto")
        if scheme.activations is None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (ours - theirs).norm() < 0.02 * theirs.norm()  # a last bit decides which way an input is rounded


def test_log_normalizers_and_softcap():
    model = made_model("gemma3")
    model.config.final_logit_softcapping = 2.0
    decoder = Decoder(weights_of(model))
    hidden, theirs = decoder.run([Segment(PROMPT)]), logits_of(model, PROMPT)[-1]
    torch.testing.assert_close(decoder.log_normalizers(hidden)[0], theirs.logsumexp(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment([])], "without tokens"),
        ([Segment([96])], "token ids 96 to 96; the model has 0 to 95"),
        ([Segment([-1])], "token ids -1"),
        ([Segment([1] * 129)], "a prompt of 129 tokens; the limit is 128"),
    ],
)
def test_what_cannot_run_says_why(segments, message):
    with pytest.raises(ModelError, match=message):
        Decoder(weights_of(made_model("llama"))).run(segments)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "gemma2"])
def test_a_model_is_asked_whether_it_is_laid_out_so(family):
    """A mixture has other layers; Gemma 2 caps what attention multiplies."""
    reason = unsupported(made_model(family))
    assert (reason is None) == (family not in ("mixtral", "gemma2")), reason


def test_changed_layers_are_not_read_over():
    lm = made_model("llama")
    adapted = get_peft_model(lm, LoraConfig(target_modules=["q_proj"]))
    assert "class Linear" in unsupported(adapted)
    hooked = made_model("llama")
    hooked.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: None)
    assert "what enters its modules" in unsupported(hooked)
    mixed = made_model("llama")
    mixed.lm_head.to(torch.bfloat16)
    assert "several types" in unsupported(mixed)


def test_attention_equals_its_formula():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 5, 6, 8), torch.randn(3, 5, 2, 8), torch.randn(3, 5, 2, 8)
    past = torch.randn(2, 2, 11, 8)
    for window in (None, 20, 9, 3, 1):
        keys, values = (
            torch.cat([states.expand(3, -1, -1, -1), own.transpose(1, 2)], 2).repeat_interleave(3, 1)
            for states, own in zip(past, (key, value), strict=True)
        )
        distance = torch.arange(11, 16)[:, None] - torch.arange(16)
        hidden = (distance < 0) | (distance >= (window or 100))
        products = (query.transpose(1, 2) @ keys.mT * 0.4).masked_fill(hidden, -torch.inf)
        expected = (products.softmax(-1) @ values).transpose(1, 2)
        ours = attend(query, key, value, (past[0], past[1]), 0.4, window)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
