"""What a compressed model keeps of its source: head, dtype, names, tokenizer; and what is refused before a block."""

import json

import pytest
import torch
import transformers
from made_models import made_model
from safetensors.torch import load_file, save_file
from test_prune_stage import QUIET, text

from limbeck.compress import walk
from limbeck.compress.blocks import Blocks, groups_of
from limbeck.compress.fidelity import GateConfig
from limbeck.compress.folds import find_folds
from limbeck.compress.moments import MomentsConfig
from limbeck.compress.moments import run as collect
from limbeck.compress.prune.stage import PruneConfig
from limbeck.compress.prune.stage import run as prune
from limbeck.compress.quantize.stage import QuantizeConfig
from limbeck.compress.quantize.stage import run as quantize
from limbeck.errors import CheckpointError, CompressionError, ConfigError, ModelError
from limbeck.models.load import load_tokenizer
from limbeck.models.weight_files import stored_dtype, tensor_files

TOKENIZER = load_tokenizer("tiny-teacher")
IDS = torch.randint(3, len(TOKENIZER), (2, 24), generator=torch.Generator().manual_seed(0))
ROUNDED = {"scheme": "w8a16", "group_size": 16, "method": "rtn"}


def saved(family, path, dtype=torch.float32, **sizes):
    model = made_model(family, vocab_size=len(TOKENIZER), **sizes).to(dtype)
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return model


def logits(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


def quantized(tmp_path, **fields):
    fields = {"calibration": text(tmp_path / "text"), "gate": QUIET} | ROUNDED | fields
    return quantize(QuantizeConfig(model=str(tmp_path / "model"), **fields), tmp_path / "out").metrics


def pruned(tmp_path, **fields):
    fields = {"calibration": text(tmp_path / "text"), "gate": QUIET, "multiple_of": 8} | fields
    return prune(PruneConfig(model=str(tmp_path / "model"), **fields), tmp_path / "out").metrics


def error(tmp_path):
    """Of the logits that stock transformers computes, relative."""
    expected, found = logits(tmp_path / "model"), logits(tmp_path / "out")
    return float((found - expected).norm() / expected.norm())


def tree_of(path):
    return json.loads((path / "config.json").read_text())


def rewrite(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")


def test_a_trained_head_that_the_config_ties_is_kept(tmp_path, capfd):
    saved("llama-tied", tmp_path / "model")
    noise = torch.randn(len(TOKENIZER), 32, generator=torch.Generator().manual_seed(4))
    rewrite(tmp_path / "model", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + noise}))
    quantized(tmp_path)
    assert "its head differs from the embedding" in " ".join("".join(capfd.readouterr()).split())
    assert tree_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert error(tmp_path) < 0.05


def test_a_head_that_equals_the_embedding_stays_tied(tmp_path):
    saved("llama-tied", tmp_path / "model")
    rewrite(tmp_path / "model", lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    quantized(tmp_path)
    assert "lm_head.weight" not in tensor_files(tmp_path / "out") and tree_of(tmp_path / "out")["tie_word_embeddings"]


def test_only_what_the_index_names_is_read(tmp_path):
    model = saved("llama", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    stale = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_file(stale, tmp_path / "model" / "model-00001-of-00099.safetensors")
    quantized(tmp_path)
    assert error(tmp_path) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compress", [quantized, pruned])
def test_the_config_says_the_dtype_of_the_file(compress, dtype, tmp_path):
    saved("qwen2", tmp_path / "model", dtype)
    compress(tmp_path)
    assert tree_of(tmp_path / "out")["dtype"] == str(dtype).removeprefix("torch.")
    assert stored_dtype(tmp_path / "out") == dtype


def test_a_mixture_is_written_by_the_names_that_it_had(tmp_path):
    saved("mixtral", tmp_path / "model")
    names = set(tensor_files(tmp_path / "model"))
    assert any("block_sparse_moe.experts.0.w1" in name for name in names)
    pruned(tmp_path, neuron_sparsity=0.5)
    assert set(tensor_files(tmp_path / "out")) == names
    logits(tmp_path / "out")


def test_dense_experts_beside_codes_load_and_routers_are_ignored(tmp_path):
    saved("mixtral", tmp_path / "model")
    quantized(tmp_path, ignore=("experts",))
    assert {n for n in tensor_files(tmp_path / "out") if "experts" in n} <= set(tensor_files(tmp_path / "model"))
    ignored = tree_of(tmp_path / "out")["quantization_config"]["ignore"]
    assert "model.layers.0.block_sparse_moe.gate" in ignored
    assert error(tmp_path) < 0.05


def test_no_token_for_padding_is_made_up(tmp_path):
    saved("llama", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    quantized(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").pad_token is None


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "fp8-static"])
def test_scales_of_dead_outputs_are_positive_in_float16(scheme, tmp_path):
    saved("llama", tmp_path / "model", torch.float16)
    rewrite(tmp_path / "model", lambda w: w["model.layers.0.mlp.up_proj.weight"][3].zero_())
    quantized(tmp_path, scheme=scheme, **({} if scheme == "w4a16" else {"group_size": None}))
    for name, file in tensor_files(tmp_path / "out").items():
        if name.endswith("_scale"):
            assert (load_file(file)[name].float() > 0).all(), name


def test_weights_near_the_end_of_float16_keep_their_codes(tmp_path):
    saved("llama", tmp_path / "model", torch.float16)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(tmp_path / "model", lambda w: w[name].mul_(3e-5))
    quantized(tmp_path, scheme="w8a8", group_size=None)
    files = tensor_files(tmp_path / "out")
    codes, scales = load_file(files[name])[name].float(), load_file(files[f"{name}_scale"])[f"{name}_scale"].float()
    wanted = load_file(tmp_path / "model" / "model.safetensors")[name].float()
    assert (codes * scales - wanted).norm() / wanted.norm() < 0.04


def test_dead_neurons_go_first(tmp_path):
    saved("llama", tmp_path / "model")

    def kill(weights):
        for number in range(3):
            weights[f"model.layers.{number}.mlp.down_proj.weight"][:, :8] = 0
            weights[f"model.layers.{number}.mlp.up_proj.weight"][:8] = 0

    rewrite(tmp_path / "model", kill)
    pruned(tmp_path, neuron_sparsity=1 / 6)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "model"), rtol=1e-3, atol=1e-4)


def test_without_data_errors_are_those_of_weights(tmp_path):
    saved("llama", tmp_path / "model")
    one = quantized(tmp_path)
    rewrite(tmp_path / "model", lambda w: w["model.embed_tokens.weight"].mul_(3))
    (tmp_path / "out").rename(tmp_path / "first")
    other = quantized(tmp_path)
    assert one["mean_layer_error"] == other["mean_layer_error"] > 0 and one["errors_of"] == "weights"


def test_a_perplexity_beyond_numbers_ends_well(tmp_path):
    saved("llama", tmp_path / "model")
    rewrite(tmp_path / "model", lambda w: w["lm_head.weight"].mul_(3000))
    found = quantized(tmp_path, method="gptq", gate=GateConfig(sequences=2, max_perplexity_ratio=2.0))
    assert found["held_out"]["perplexity"] is None and found["held_out"]["nll_nats"] > 709


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma2", "gemma3"])
def test_folds_leave_the_float_model_as_it_was(family, tmp_path):
    """Real factors into the norms and weights of every block, nothing rounded."""
    model = saved(family, tmp_path / "model")
    with torch.no_grad():
        before = model(IDS).logits
    blocks = Blocks(str(tmp_path / "model"))
    hidden, calls = blocks.embed(IDS[:1, :8], torch.device("cpu"))
    found = 0
    for number, layer in enumerate(model.model.layers):
        groups = [group for group in groups_of(layer, number) if group.role.endswith("_in")]
        for name, fold in find_folds(layer, groups, hidden, calls[number]).items():
            group = next(group for group in groups if group.name == name)
            factors = torch.rand(32, generator=torch.Generator().manual_seed(number)) + 0.5
            weight, factors = fold.folded(factors, torch.bfloat16)
            fold.apply(factors, weight)
            for linear in group.linears.values():
                linear.weight.data *= factors
            found += 1
    assert found == 6
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["v_proj", "up_proj"])
def test_a_norm_that_a_layer_left_alone_reads_is_not_folded(name, tmp_path):
    saved("llama", tmp_path / "model")
    blocks = Blocks(str(tmp_path / "model"))
    hidden, calls = blocks.embed(IDS[:1, :8], torch.device("cpu"))
    with blocks.block(0, torch.device("cpu")) as block:
        groups = [group.without([name]) for group in groups_of(block, 0) if group.role.endswith("_in")]
        folds = find_folds(block, groups, hidden, calls[0])
    assert set(folds) == {"layers.0.mlp_in" if name == "v_proj" else "layers.0.attention_in"}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"gate": GateConfig(labels=("1 2 3", "2"))}, "a label is one"),
        ("llama", {"group_size": 5}, r"layers\.0.* no multiple of group_size 5"),
        ("llama", {"pattern": "3:7"}, r"layers\.0\.self_attn\.q_proj: pattern 3:7"),
        ("mixtral", {}, "quantised experts are not supported"),
        ("mixtral", {"ignore": ("experts",), "equalization": "awq"}, "in a mixture"),
        ("llama", {"ignore": ("proj",)}, "nothing to quantise"),
    ],
)
def test_what_can_be_known_is_refused_before_a_block(family, fields, message, tmp_path, monkeypatch):
    saved(family, tmp_path / "model")
    written = []
    monkeypatch.setattr(walk.ShardWriter, "write", lambda *arguments: written.append(arguments))
    with pytest.raises((ConfigError, CompressionError), match=message):
        quantized(tmp_path, **fields)
    assert not written and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_tokens_beyond_the_embedding_and_other_shapes_are_refused(tmp_path):
    saved("llama", tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "model")
    size = len(TOKENIZER)
    for compress in (quantized, pruned, lambda path: collect(MomentsConfig(
        model=str(path / "model"), calibration=text(path / "text")), path / "out")):  # fmt: skip
        with pytest.raises(ModelError, match=f"{size + 2} tokens, the model {size}"):
            compress(tmp_path)
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(tree_of(tmp_path / "model") | {"intermediate_size": 64}))
    with pytest.raises(ModelError, match="in the file and"):
        quantized(tmp_path)


def test_a_full_disk_is_one_line_and_finished_blocks_stay(tmp_path, monkeypatch):
    saved("llama", tmp_path / "model")
    own, count = walk.ShardWriter.write, []

    def full(self, number, tensors):
        count.append(number)
        if len(count) == 3:
            raise CheckpointError(f"{self.path(number)}: cannot be written (No space left on device)")
        own(self, number, tensors)

    monkeypatch.setattr(walk.ShardWriter, "write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        quantized(tmp_path, method="gptq")
    assert len(list((tmp_path / "out.partial").glob("model-*.safetensors"))) == 2
