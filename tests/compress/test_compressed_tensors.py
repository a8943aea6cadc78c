"""What we write, loaded by transformers with the compressed-tensors library: its logits are ours."""

import pytest
import torch
import transformers
from made_models import FAMILIES, made_model
from written_models import linears_of, schemes_for, write_quantized

from limbeck.models.kv_quant import cache_scales
from limbeck.models.load import load_model
from limbeck.models.schemes import SCHEMES, scheme_of

pytest.importorskip("compressed_tensors")
IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(11))
EVERY = {
    **{f"w{bits}a16-g16": scheme_of(f"w{bits}a16", 16) for bits in range(2, 9)},
    "w4a16-row": scheme_of("w4a16", None),
    **{name: SCHEMES[name] for name in ("w8a8", "fp8-dynamic", "fp8-static")},
}


def theirs_and_ours(directory, dtype=torch.float32):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    ours = load_model(str(directory), dtype=dtype, whole=True)
    with torch.inference_mode():
        return theirs(IDS, use_cache=False).logits.float(), ours(IDS, use_cache=False).logits.float()


def assert_same(directory, dtype=torch.float32):
    theirs, ours = theirs_and_ours(directory, dtype)
    print(f"largest difference {(theirs - ours).abs().max():.3g} of {ours.abs().max():.3g}")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_scheme_gives_the_same_logits(name, dtype, tmp_path):
    model = made_model("llama-tied")
    write_quantized(tmp_path, model, schemes_for(model, EVERY[name]), dtype)
    assert_same(tmp_path, dtype)


@pytest.mark.parametrize("name", ["nvfp4a16", "mxfp4a16"])
def test_four_bit_floats_give_the_same_logits(name, tmp_path):
    """In bfloat16: the library unpacks them in it whatever is asked for."""
    model = made_model("llama-tied", hidden_size=64, intermediate_size=96)
    write_quantized(tmp_path, model, schemes_for(model, SCHEMES[name]), torch.bfloat16)
    assert_same(tmp_path, torch.bfloat16)


# Experts are not quantised, and Gemma 2 has no scaled-dot-product attention in transformers, which load_model asks for.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("mixtral", "gemma2")])
@pytest.mark.parametrize("name", ["w4a16-g16", "w8a8"])
def test_every_family_gives_the_same_logits(family, name, tmp_path):
    model = made_model(family)
    write_quantized(tmp_path, model, schemes_for(model, EVERY[name]))
    assert_same(tmp_path)


def test_mixed_precision_gives_the_same_logits(tmp_path):
    model = made_model("qwen3")
    kinds = [EVERY["w4a16-g16"], EVERY["w8a8"], EVERY["fp8-dynamic"], EVERY["w8a16-g16"], None]
    names = linears_of(model)
    write_quantized(tmp_path, model, {n: k for i, n in enumerate(names) if (k := kinds[i % 5]) is not None})
    assert_same(tmp_path)


@pytest.mark.parametrize("name", ["w4a16-g16", "fp8-dynamic"])
def test_a_quantised_cache_gives_the_same_logits(name, tmp_path):
    model = made_model("llama")
    scales = cache_scales(model, [IDS])
    write_quantized(tmp_path / "kv", model, schemes_for(model, EVERY[name]), kv_scales=scales)
    assert_same(tmp_path / "kv")
    write_quantized(tmp_path / "plain", model, schemes_for(model, EVERY[name]))
    difference = theirs_and_ours(tmp_path / "kv")[1] - theirs_and_ours(tmp_path / "plain")[1]
    assert difference.abs().max() > 1e-4, "the cache has to be rounded at all"


def test_without_the_status_the_library_computes_something_else(tmp_path):
    """The trap that the reader refuses: no error there, other numbers."""
    model = made_model("llama")
    write_quantized(tmp_path, model, schemes_for(model, EVERY["w8a8"]))
    right, _ = theirs_and_ours(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"quantization_status": "compressed", ', ""))
    wrong = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert (wrong(IDS, use_cache=False).logits - right).abs().max() > 1
