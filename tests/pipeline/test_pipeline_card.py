"""The model card: what it says follows from the recipe and from what was measured, and from nothing else."""

import pytest
import yaml
from huggingface_hub import ModelCard

from limbeck.checkpoint import write_manifest
from limbeck.config import build, to_dict
from limbeck.pipeline.card import base_models, card_text
from limbeck.pipeline.config import CardConfig, PipelineConfig

TRACES = {"source": "builtin:chain", "num_traces": 40}
DISTILL = {"student": {"model": "smollm2-135m"}, "teacher": {"model": "big/teacher"}, "traces": TRACES}
STEP = {"stage": "distill", "ran": True, "measured": {"seconds": 3.0, "flops": 2e9}, "predicted": None}
SCORED = {
    "name": "quantize",
    "numbers": {"accuracy": 0.75, "accuracy_low": 0.5, "accuracy_high": 1.0, "parameters": 1000, "weight_bytes": 512},
}


def card(tree, tmp_path, models=(), **config):
    settings = to_dict(build(PipelineConfig, tree, "recipe"))
    metrics = {"stages": [STEP], "models": list(models)}
    return ModelCard(card_text("A small one", CardConfig(**config), settings, "title: x\n", metrics, tmp_path))


def test_the_metadata_are_those_of_the_recipe(tmp_path):
    tree = {"distill": DISTILL, "quantize": {}, "evaluate": {"problems": TRACES}, "export": {}}
    found = card(tree, tmp_path, [SCORED], license="mit", language=("en", "de"), tags=("mine", "limbeck"))
    assert found.data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct", "big/teacher"]
    assert found.data.license == "mit" and found.data.language == ["en", "de"]
    assert found.data.tags == ["limbeck", "distillation", "quantized", "compressed-tensors", "mine"]
    (result,) = found.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.75, "builtin:chain")
    assert found.data.model_name == "A small one" and "# A small one" in found.text
    assert "on traces of 40 problems of" not in found.text and "on traces of `builtin:chain`" in found.text


def test_without_scores_it_claims_none(tmp_path):
    found = card({"distill": DISTILL, "export": {}}, tmp_path, name="Other")
    assert found.data.eval_results is None and found.data.model_name is None
    assert "It was scored on no task." in found.text and "## Quality and size" not in found.text
    assert "Training answers were not checked" in found.text and "# Other" in found.text


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"export": {"model": "tiny-student", "format": "gguf"}}, "--engine llamacpp"),
        ({"export": {"model": "tiny-student"}}, "vllm serve PATH/OF/THIS/DIRECTORY"),
        ({"export": {"model": "tiny-student"}, "push_to_hub": {"repository": "me/it"}}, 'from_pretrained("me/it")'),
    ],
)
def test_it_says_how_to_use_what_was_exported(tree, line, tmp_path):
    assert line in card(tree, tmp_path).text


def test_what_was_made_is_read_from_the_stages(tmp_path):
    checked = {"kept": 7, "dropped": {"wrong answer": 3}}
    (tmp_path / "verify").mkdir()
    write_manifest(tmp_path / "verify", stage="traces verify", config=CardConfig(), inputs={}, counts=checked)
    (tmp_path / "export").mkdir()
    metrics = {"format": "gguf", "bytes_after": 1234, "in_llama.cpp": "not run"}
    write_manifest(tmp_path / "export", stage="export", config=CardConfig(), inputs={}, metrics=metrics)
    text = card({"distill": DISTILL, "verify": {"traces": TRACES}, "export": {}}, tmp_path).text
    assert '- verified: 7 kept, dropped {"wrong answer": 3}' in text
    assert "- export: gguf, 1,234 bytes of weights\n" in text
    assert "It was not loaded in llama.cpp before it was published." in text
    assert "Training answers were not checked" not in text


def test_models_by_role():
    assert base_models({"distill": None, "quantize": {"model": "a/b"}}) == ("a/b", None)
    same = {"student": {"model": "a/b"}, "teacher": {"model": "a/b"}}
    assert base_models({"distill": same}) == ("a/b", None)


def test_the_recipe_stands_at_its_end(tmp_path):
    text = card({"distill": DISTILL, "export": {}}, tmp_path, limits="Not for poems.").text
    assert yaml.safe_load(text.split("```yaml")[1].split("```")[0]) == {"title": "x"}
    assert "- Not for poems." in text and str(tmp_path) not in text
