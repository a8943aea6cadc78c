"""The compiled kernels of decoding: torch's numbers, and the same bits in any company and on any number of threads."""

import pytest
import torch
from kernels_here import kernels_here
from made_models import made_model

from limbeck.engine.decoder import Decoder, KeyValues, Segment
from limbeck.engine.int8 import Int8Linear
from limbeck.engine.native import build
from limbeck.engine.native.decode import NativeLinear
from limbeck.engine.steps import Steps
from limbeck.engine.weights import DenseLinear, weights_of
from limbeck.errors import ConfigError, ModelError

pytestmark = pytest.mark.skipif("compiled" not in kernels_here(), reason="no C++ compiler, or no AVX2")
FAMILIES = ["llama", "llama-tied", "llama-biased", "qwen2", "qwen3", "mistral", "gemma", "gemma3"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def prompts_of(decoder, lengths, room=40):
    """Keys and values of prompts."""
    torch.manual_seed(0)
    found = []
    for length in lengths:
        states = KeyValues(decoder, length + room)
        states.keys.zero_()
        states.values.zero_()
        decoder.run([Segment(torch.randint(96, (length,)).tolist(), states, 0, grows=True)])
        found.append((states, length))
    return found


def copies(decoder, texts):
    found = []
    for states, length in texts:
        copy = KeyValues(decoder, states.room)
        copy.put(0, states.keys, states.values)
        found.append((copy, length))
    return found


def segments_of(texts, tokens):
    return [Segment([token], states, length, True) for (states, length), token in zip(texts, tokens, strict=True)]


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_torch(family, precision):
    """States and logits; keys and values; over windows, norms, biases and activations."""
    decoder = Decoder(weights_of(made_model(family), precision))
    texts = prompts_of(decoder, (5, 30, 1, 17))
    own = copies(decoder, texts)
    compiled, plain = Steps(decoder, kernels="compiled"), Steps(decoder, kernels="torch")
    assert compiled.are_compiled and not plain.are_compiled
    # Where an input lies between two codes, either may come out.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "float32" else {"rtol": 1e-2, "atol": 1e-2}
    for step in range(3):
        tokens = [(7 * step + n) % 96 for n in range(len(texts))]
        found, expected = compiled.run(segments_of(own, tokens)), plain.run(segments_of(texts, tokens))
        torch.testing.assert_close(found, expected, **tolerance)
        torch.testing.assert_close(compiled.logits(expected), plain.logits(expected), rtol=1e-4, atol=1e-4)
        for (ours, length), (theirs, _) in zip(own, texts, strict=True):
            for name in ("keys", "values"):
                one, other = (getattr(part, name)[:, :, : length + 1] for part in (ours, theirs))
                torch.testing.assert_close(one, other, **tolerance)
        own, texts = ([(states, length + 1) for states, length in part] for part in (own, texts))


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_row_has_its_bits_in_any_company(family, precision, threads):
    decoder = Decoder(weights_of(made_model(family), precision))
    steps = Steps(decoder, kernels="compiled")
    texts = prompts_of(decoder, (5, 30, 1, 17, 8, 9, 2, 33, 12, 6, 3))
    tokens = list(range(len(texts)))
    together = copies(decoder, texts)
    whole = steps.run(segments_of(together, tokens))
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(steps.run(segments_of(copies(decoder, texts), tokens)), whole)
        assert torch.equal(steps.run(segments_of(copies(decoder, texts)[::-1], tokens[::-1])), whole.flip(0))
        for number in (0, 3, 10):
            alone = copies(decoder, texts[number : number + 1])
            assert torch.equal(steps.run(segments_of(alone, tokens[number : number + 1])), whole[number : number + 1])
            assert torch.equal(alone[0][0].keys, together[number][0].keys)
        assert torch.equal(torch.cat([steps.logits(row[None]) for row in whole]), steps.logits(whole))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_tokens_of_one_text_in_one_call_are_those_one_by_one(precision):
    """What speculative decoding rests on."""
    decoder = Decoder(weights_of(made_model("llama"), precision))
    steps = Steps(decoder, kernels="compiled")
    texts = prompts_of(decoder, (9,))
    apart = copies(decoder, texts)
    (states, length), (other, _) = texts[0], apart[0]
    tokens = [5, 80, 3, 3, 41]
    together = steps.run([Segment([token], states, length + n, True) for n, token in enumerate(tokens)])
    one_by_one = [steps.run([Segment([token], other, length + n, True)]) for n, token in enumerate(tokens)]
    assert torch.equal(together, torch.cat(one_by_one))
    assert torch.equal(states.keys[:, :, : length + 5], other.keys[:, :, : length + 5])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_texts_behind_one_prompt_have_the_bits_of_texts_of_their_own(family):
    """Windows begin in the prompt, at its end and behind it."""
    decoder = Decoder(weights_of(made_model(family)))
    steps = Steps(decoder, kernels="compiled")
    ((prompt, length),) = prompts_of(decoder, (11,), room=0)
    apart = [(decoder.behind(prompt, 20), length) for _ in range(3)]
    shared = [(steps.behind(prompt, 20), length) for _ in range(3)]
    assert shared[0][0].keys.shape[2] == 20 and apart[0][0].keys.shape[2] == 31
    for step in range(20):
        tokens = [(5 * step + 31 * number) % 96 for number in range(3)]
        found = steps.run(segments_of(shared, tokens))
        assert torch.equal(found, steps.run(segments_of(apart, tokens)))
        apart, shared = ([(states, end + 1) for states, end in texts] for texts in (apart, shared))
    for one, other in zip(shared[1][0].cut(3, 31), apart[1][0].cut(3, 31), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(96, 64), (33, 47), (1, 2), (100, 576), (7, 1)])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_products_of_any_shape(shape, kind):
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    linear = DenseLinear(weight, bias) if kind == "float32" else Int8Linear.rounded(weight, bias)
    rows = torch.randn(70, shape[1]) * torch.logspace(-3, 3, 70)[:, None]
    rows[3] = 0
    found = NativeLinear(linear)(rows)
    expected = linear(rows)
    scale = rows.abs().amax(1, keepdim=True) * weight.abs().amax() * shape[1] ** 0.5 + 1
    assert float(((found - expected) / scale).abs().max()) < (1e-6 if kind == "float32" else 0.01)
    assert torch.equal(NativeLinear(linear)(rows[40:41]), found[40:41])


def test_sums_of_the_largest_codes_are_exact():
    for sign in (1.0, -1.0):
        found = NativeLinear(Int8Linear.rounded(torch.full((3, 1024), sign)))(torch.ones(2, 1024))
        torch.testing.assert_close(found, torch.full((2, 3), sign * 1024), rtol=0.005, atol=0)


def test_a_token_without_a_place_is_refused():
    decoder = Decoder(weights_of(made_model("llama")))
    ((states, length),) = prompts_of(decoder, (5,), room=1)
    steps = Steps(decoder, kernels="compiled")
    steps.run([Segment([1], states, length, True)])
    with pytest.raises(ModelError, match="position 6"):
        steps.run([Segment([1], states, length + 1, True)])


def test_without_a_compiler_torch_decodes(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    try:
        decoder = Decoder(weights_of(made_model("llama")))
        steps = Steps(decoder)
        assert not steps.are_compiled and "no C++ compiler" in steps.missing
        with pytest.raises(ConfigError, match=r"no C\+\+ compiler .*; take torch or auto"):
            Steps(decoder, kernels="compiled")
    finally:
        build.library.cache_clear()


def test_a_compiler_that_fails_is_told(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'unknown flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.library.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"broken does not compile decode.cpp here .unknown flag"):
            Steps(Decoder(weights_of(made_model("llama"))), kernels="compiled")
        assert not list((tmp_path / "cache").rglob("*.so"))
    finally:
        build.library.cache_clear()
