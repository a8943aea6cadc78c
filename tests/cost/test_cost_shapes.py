"""Shapes without weights: published ones are what their cards say, local ones what a loaded model has."""

import pytest
from tiny_runs import save_model

from limbeck.cost.shapes import PUBLISHED, Dims, config_of, frozen_sizes, published_name
from limbeck.errors import ConfigError, LimbeckError
from limbeck.models.anatomy import sizes_of
from limbeck.models.load import load_model

BILLIONS = {
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.721,
    "qwen3-4b": 4.022,
    "qwen3-8b": 8.191,
    "qwen3-14b": 14.768,
    "qwen3-32b": 32.762,
    "qwen2.5-7b": 7.616,
    "qwen2.5-32b": 32.764,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "llama-3.1-8b": 8.030,
    "llama-3.3-70b": 70.554,
}


def test_published_shapes_have_the_parameters_of_their_cards():
    assert set(BILLIONS) == set(PUBLISHED)
    for name, billions in BILLIONS.items():
        assert frozen_sizes(config_of(name)).num_parameters / 1e9 == pytest.approx(billions, abs=0.0006), name


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-8B", "qwen3-8b", "Qwen3-8B-Base", "meta-llama/Llama-3.1-8B-Instruct", "Meta-Llama-3.1-8B"]
)
def test_names_of_a_family(name):
    assert published_name(name) in ("qwen3-8b", "llama-3.1-8b")
    assert published_name("qwen3-9b") is None


@pytest.mark.parametrize("name", ["tiny-student", "tiny-teacher"])
def test_meta_sizes_are_those_of_the_loaded_model(name):
    model = load_model(name).requires_grad_(False)
    assert frozen_sizes(config_of(name)) == sizes_of(model)


def test_a_directory_wins_over_a_published_name(tmp_path):
    directory = save_model(tmp_path / "qwen3-8b", kind="qwen3")
    assert config_of(directory).hidden_size == 16


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(LimbeckError, match="qwen3-8b"):
        config_of("qwen3-8c")


def test_mixtures_are_refused():
    config = config_of("qwen3-0.6b")
    config.num_experts = 8
    with pytest.raises(ConfigError, match="mixtures of experts"):
        Dims.of(config)
