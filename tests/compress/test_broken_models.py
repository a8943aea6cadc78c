"""Commands on models that are broken in one way or another: a result, or one line and exit code 2; never a stack.

A case is a command and a damage, each drawn from a list, with numbers drawn for it. A fixed sample runs by default, the
whole table among the slow tests.
"""

import json
import random
import re
import shutil

import pytest
import torch
from made_models import made_model
from safetensors.torch import load_file, save_file

from limbeck.cli import main
from limbeck.models.load import load_tokenizer

COMMANDS = {
    "quantize": ["quantize", "--group-size", "16", "--method", "gptq"],
    "quantize awq": ["quantize", "--group-size", "16", "--method", "rtn", "--equalization", "awq"],
    "quantize w8a8": ["quantize", "--scheme", "w8a8", "--method", "rtn"],
    "quantize 2:4": ["quantize", "--group-size", "16", "--pattern", "2:4"],
    "prune neurons": ["prune", "--neuron-sparsity", "0.5", "--multiple-of", "8"],
    "prune groups": ["prune", "--neuron-sparsity", "0", "--kv-group-sparsity", "0.5"],
    "prune layers": ["prune", "--method", "depth", "--drop-layers", "1"],
    "prune weights": ["prune", "--method", "wanda", "--pattern", "0.5"],
    "moments": ["moments"],
    "export": ["export", "--scheme", "w8a8"],
    "export dense": ["export", "--format", "dense", "--dtype", "float16"],
    "export gguf": ["export", "--format", "gguf", "--gguf-type", "q8_0"],
}
FAMILIES = ("llama-tied", "qwen2", "gemma3", "mixtral")
SAMPLE = 36


def set_config(directory, draw):
    """A field of config.json with a value of another kind, or out of range."""
    path = directory / "config.json"
    tree = json.loads(path.read_text())
    keys = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    key = draw.choice([*keys, "vocab_size", "head_dim", "rms_norm_eps", "hidden_act", "rope_parameters", "layer_types"])
    tree[key] = draw.choice([0, -1, 3, 7, 10**6, "many", None, [], {}, 1.5])
    path.write_text(json.dumps(tree))


def drop_config_field(directory, draw):
    path = directory / "config.json"
    tree = json.loads(path.read_text())
    del tree[draw.choice(sorted(tree))]
    path.write_text(json.dumps(tree))


def other_model_type(directory, draw):
    path = directory / "config.json"
    kinds = ["gpt2", "bert", "t5", "mamba", "no-such-type", "phi", "olmo2", 5]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": draw.choice(kinds)}))


def cut_file(directory, draw):
    """A file of the directory ends early."""
    path = draw.choice(sorted(path for path in directory.iterdir() if path.is_file()))
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def missing_file(directory, draw):
    draw.choice(sorted(path for path in directory.iterdir() if path.is_file())).unlink()


def weights_of(directory):
    return load_file(directory / "model.safetensors")


def write(directory, weights):
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")


def bad_number(directory, draw):
    """A weight that is no number, infinite, huge or next to nothing."""
    weights = weights_of(directory)
    tensor = weights[draw.choice(sorted(weights))]
    tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice([float("nan"), float("inf"), 1e30, -1e6, 1e-40])
    write(directory, weights)


def all_of_one_value(directory, draw):
    """A tensor of zeros, of tiny or of large numbers."""
    weights = weights_of(directory)
    weights[draw.choice(sorted(weights))].fill_(draw.choice([0.0, 1e-30, 1e20]))
    write(directory, weights)


def missing_tensor(directory, draw):
    weights = weights_of(directory)
    del weights[draw.choice(sorted(weights))]
    write(directory, weights)


def other_shape(directory, draw):
    weights = weights_of(directory)
    name = draw.choice(sorted(weights))
    weights[name] = draw.choice([weights[name][:-1], weights[name][None], weights[name].flatten()]).clone()
    write(directory, weights)


def extra_tensor(directory, draw):
    weights = weights_of(directory)
    weights[draw.choice(["lm_head.weight", "model.layers.9.mlp.up_proj.weight", "vision.weight"])] = torch.ones(3, 4)
    write(directory, weights)


def other_dtype(directory, draw):
    weights = weights_of(directory)
    dtype = draw.choice([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.float8_e4m3fn])
    for name in draw.sample(sorted(weights), draw.randrange(1, len(weights))):
        weights[name] = weights[name].to(dtype)
    write(directory, weights)


def index_of_others(directory, draw):
    """An index that names files or tensors which are not there."""
    names = sorted(weights_of(directory))
    files = draw.choice([{names[0]: "gone.safetensors"}, {"no.such": "model.safetensors"}, dict.fromkeys(names, 5), []])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def more_tokens(directory, draw):
    """Tokens beyond the embedding, special or not."""
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_tokens([f"<{number}>" for number in range(draw.randrange(1, 90))], special_tokens=draw.random() < 0.5)
    tokenizer.save_pretrained(directory)


def odd_tokenizer(directory, draw):
    """A tokenizer whose parts are of another kind, or missing."""
    path = directory / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree[draw.choice(["model", "pre_tokenizer", "added_tokens", "normalizer"])] = draw.choice([None, [], {}, "BPE"])
    path.write_text(json.dumps(tree))


def claims_codes(directory, draw):
    """config.json says quantised, and the weights are not."""
    path = directory / "config.json"
    group = {"targets": ["Linear"], "weights": draw.choice([None, {}, {"num_bits": 4, "type": "int"}])}
    found = {"quant_method": draw.choice(["compressed-tensors", "gptq", None]), "format": "pack-quantized"}
    found |= {"quantization_status": "compressed", "config_groups": draw.choice([{"group_0": group}, {}, None])}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": found}))


def stray_shards(directory, draw):
    """Files beside the model that are not its own."""
    (directory / f"{draw.choice(['model-00001-of-00002', 'mask', 'adapter'])}.safetensors").write_bytes(b"nothing")


def none(directory, draw):
    """Sound."""


DAMAGES = [
    set_config,
    drop_config_field,
    other_model_type,
    cut_file,
    missing_file,
    bad_number,
    all_of_one_value,
    missing_tensor,
    other_shape,
    extra_tensor,
    other_dtype,
    index_of_others,
    more_tokens,
    odd_tokenizer,
    claims_codes,
    stray_shards,
]
CASES = [(command, damage, seed) for seed in range(2) for damage in DAMAGES for command in COMMANDS]
random.Random(0).shuffle(CASES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A sound model of each family, with a tokenizer, and the text to calibrate on."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer("tiny-teacher")
    for family in FAMILIES:
        made_model(family, vocab_size=len(tokenizer)).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    (root / "text").write_text(" ".join(str(number) for number in range(100, 500)))
    return root


def told(capfd, arguments):
    """Exit code and all that was said; what `main` does not catch fails the test by itself."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capfd.readouterr()
    return ended.value.code, re.sub(r"\s+", " ", out + err)


def check(models, tmp_path, capfd, command, damage, seed):
    draw = random.Random(f"{command} {damage.__name__} {seed}")
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(models / draw.choice(FAMILIES), model)
    damage(model, draw)
    arguments = [*COMMANDS[command], "--model", str(model), "--out", str(out)]
    if not command.startswith("export"):
        arguments += ["--calibration.text", str(models / "text"), "--calibration.sequence-length-tokens", "24"]
        arguments += ["--calibration.sequences", "4"]
        arguments += [] if command == "moments" else ["--gate.sequences", "1"]
    else:
        arguments += ["--probe.text", str(models / "text")]
    code, said = told(capfd, arguments)
    assert "Traceback" not in said
    if code == 2:
        assert "limbeck: " in said and not out.exists(), "a refusal is a line, and leaves nothing"
    else:
        assert code == 0 or (code == 1 and command.startswith("export"))
        assert (out / "limbeck.json").exists()


@pytest.mark.parametrize(("command", "damage", "seed"), CASES[:SAMPLE])
def test_a_broken_model_is_worked_on_or_refused_in_a_line(models, tmp_path, capfd, command, damage, seed):
    check(models, tmp_path, capfd, command, damage, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "damage", "seed"), CASES[SAMPLE:])
def test_every_broken_model_is_worked_on_or_refused_in_a_line(models, tmp_path, capfd, command, damage, seed):
    check(models, tmp_path, capfd, command, damage, seed)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "export gguf"])
def test_a_sound_model_is_worked_on(models, tmp_path, capfd, command):
    """What the table is worth: without damage, and with the seed that it would have, the commands succeed."""
    check(models, tmp_path, capfd, command, none, 0)
    assert (tmp_path / "out" / "limbeck.json").exists()
