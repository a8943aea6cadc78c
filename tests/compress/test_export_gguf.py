"""GGUF files: blocks, names, the turn of query and key, the tokenizer's metadata."""

import json

import numpy as np
import pytest
import torch
import transformers
from made_tokenizers import byte_tokenizer, metaspace_tokenizer
from written_models import rounded_to, save_exportable, schemes_for, write_quantized

from limbeck.compress.export.gguf import family_of, pair_order, write_gguf
from limbeck.compress.export.gguf_blocks import SourceWeights, blocks_of, fits
from limbeck.compress.export.gguf_vocabulary import split_name
from limbeck.errors import CompressionError
from limbeck.models.load import load_model, load_tokenizer
from limbeck.models.schemes import SCHEMES, StoredWeight, scheme_of

gguf = pytest.importorskip("gguf")


def stored_of(scheme, shape=(24, 128)):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized = rounded_to(weight, scheme, torch.bfloat16)
    return StoredWeight(quantized.codes, quantized.scales, scheme), quantized.dequantize()


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (scheme_of("w4a16", 32), "q4_0"),
        (scheme_of("w4a16", 64), "q4_0"),
        (scheme_of("w3a16", None), "q4_0"),
        (SCHEMES["w8a8"], "q8_0"),
        (scheme_of("w8a16", 32), "q8_0"),
        (scheme_of("w4a16", 32), "q8_0"),
    ],
)
def test_codes_are_carried_over_exactly(scheme, kind):
    stored, dense = stored_of(scheme)
    assert fits(stored, kind)
    read = gguf.quants.dequantize(blocks_of(stored, kind), gguf.GGMLQuantizationType[kind.upper()])
    assert torch.equal(torch.from_numpy(read), dense)


def test_codes_that_do_not_fit_are_not_carried_over():
    assert not fits(stored_of(scheme_of("w4a16", 16))[0], "q4_0")
    assert not fits(stored_of(scheme_of("w8a16", 32))[0], "q4_0")
    assert not fits(stored_of(SCHEMES["fp8-dynamic"])[0], "q8_0")
    assert not fits(stored_of(scheme_of("w4a16", 32))[0], "f16")


def test_pairs_stand_side_by_side():
    assert pair_order(12, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def read_file(path):
    reader = gguf.GGUFReader(path)
    return reader, {tensor.name: tensor for tensor in reader.tensors}


def test_names_types_and_rows(tmp_path):
    source = save_exportable(tmp_path / "model", "llama")
    counts = write_gguf(tmp_path / "m.gguf", source, "q4_0")
    reader, tensors = read_file(tmp_path / "m.gguf")
    # Embedding and head stay at 8 bits; every row of this model is a multiple of 32.
    assert counts == {"carried_over": 0, "f32": 5, "q4_0": 14, "q8_0": 2}
    state = load_model(source, whole=True).state_dict()
    weights = SourceWeights(source)
    for name, place in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        found = gguf.quants.dequantize(tensors[f"blk.1.{place}.weight"].data, gguf.GGMLQuantizationType.Q4_0)
        full = f"model.layers.1.{name}.weight"
        assert torch.equal(torch.from_numpy(found), weights.rounded(full, "q4_0"))
        assert (weights.rounded(full, "q4_0") - state[full]).abs().max() < 0.1
    query = gguf.quants.dequantize(tensors["blk.0.attn_q.weight"].data, gguf.GGMLQuantizationType.Q4_0)
    expected = weights.rounded("model.layers.0.self_attn.q_proj.weight", "q4_0").numpy()
    assert np.array_equal(query, expected[pair_order(64, 4)]) and not np.array_equal(query, expected)
    assert torch.equal(torch.from_numpy(tensors["output_norm.weight"].data.copy()), state["model.norm.weight"])
    assert reader.get_field("general.architecture").contents() == "llama"


def test_a_quantised_directory_gives_its_own_codes(tmp_path):
    source = save_exportable(tmp_path / "model", "llama-tied")
    model = load_model(source, whole=True)
    dense = write_quantized(tmp_path / "q", model, schemes_for(model, scheme_of("w4a16", 32)), torch.bfloat16)
    load_tokenizer(source).save_pretrained(tmp_path / "q")
    counts = write_gguf(tmp_path / "m.gguf", str(tmp_path / "q"), "q4_0")
    assert counts["carried_over"] == 14
    _, tensors = read_file(tmp_path / "m.gguf")
    assert "output.weight" not in tensors
    found = gguf.quants.dequantize(tensors["blk.0.ffn_up.weight"].data, gguf.GGMLQuantizationType.Q4_0)
    exact = SourceWeights(str(tmp_path / "q")).state["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(torch.from_numpy(found), exact)
    assert torch.equal(exact.bfloat16(), dense["model.layers.0.mlp.up_proj.weight"])


def test_tokenizer_and_template(tmp_path):
    source = save_exportable(tmp_path / "model", "qwen2")
    write_gguf(tmp_path / "m.gguf", source, "f16")
    tokenizer = load_tokenizer(source)
    reader, _ = read_file(tmp_path / "m.gguf")

    def value(key):
        return reader.get_field(f"tokenizer.{key}").contents()

    tokens = value("ggml.tokens")
    # The embedding has more rows than there are tokens.
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[-1].startswith("[PAD") and len(tokens) == load_model(source, whole=True).config.vocab_size
    assert value("ggml.token_type")[:4] == [3, 3, 3, 3] and value("ggml.token_type")[-1] == 5
    # transformers gives its Qwen2 tokenizer the Qwen2 split, whatever the file says.
    assert value("ggml.merges")[3] == "Ġt he" and value("ggml.pre") == "qwen2"
    assert value("chat_template") == tokenizer.chat_template
    assert value("ggml.eos_token_id") == tokenizer.eos_token_id and value("ggml.add_bos_token") is False


def test_llama3_rope_becomes_factors(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    source = save_exportable(tmp_path / "model", "llama", rope_parameters=rope)
    write_gguf(tmp_path / "m.gguf", source, "f16")
    _, tensors = read_file(tmp_path / "m.gguf")
    factors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    assert factors[0] == 1 and factors[-1] == pytest.approx(8.0) and (factors.diff() > -1e-5).all()


def test_known_splits():
    qwen = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {
                    "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                },
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    }
    assert split_name(qwen) == "qwen2"
    split = qwen["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
    assert split_name(qwen) == "llama-bpe"
    split["Regex"] = r"\s+"
    with pytest.raises(CompressionError, match="has no known name"):
        split_name(qwen)
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert split_name({"type": "Sequence", "pretokenizers": [digits, byte_level]}) == "smollm"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'yarn'"),
        ({"hidden_act": "gelu"}, "computes silu in such models"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes, message):
    with pytest.raises(CompressionError, match=message):
        family_of(transformers.LlamaConfig(**changes))
    with pytest.raises(CompressionError, match="'mixtral' has no GGUF mapping"):
        family_of(transformers.MixtralConfig())


def test_foreign_tokenizers_are_refused_or_named(tmp_path):
    source = save_exportable(tmp_path / "model", "llama")
    metaspace_tokenizer().save_pretrained(source)
    with pytest.raises(CompressionError, match="not byte-level BPE"):
        write_gguf(tmp_path / "m.gguf", source, "f16")
    byte_tokenizer().save_pretrained(source)
    with pytest.raises(CompressionError, match="set pre_tokenizer"):
        write_gguf(tmp_path / "m.gguf", source, "f16")
    write_gguf(tmp_path / "m.gguf", source, "f16", pre_tokenizer="default")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 20}))
    with pytest.raises(CompressionError, match="gguf_type 'q5_0' is unknown"):
        write_gguf(tmp_path / "m.gguf", source, "q5_0")
