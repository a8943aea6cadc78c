"""Zeros of a pruned student: kept by every optimizer, on every rank and over an interruption, or refused."""

import json
import typing

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import assert_same_bits, metrics_of, one_step, run_config, save_model, train_on_ranks, weights_of

from limbeck.distill import train
from limbeck.distill.zeros import KeptZeros
from limbeck.errors import ConfigError
from limbeck.models.load import load_model
from limbeck.optim.build import OptimizerName
from limbeck.stage import How

SETTINGS = {
    "adamw": {"learning_rate": 1e-2, "weight_decay": 0.5},
    "sgld": {"learning_rate": 1e-3, "noise.temperature": 1e-2},
    "psgld": {"learning_rate": 1e-3, "noise.temperature": 1e-2},
    "noisy_sgd": {"learning_rate": 1e-2, "noise.noise_radius": 0.1, "noise.quiet_fraction": 0.0},
}
LOUD = {"noise.mode": "constant", "noise.noise_radius": 0.1, "noise.quiet_fraction": 0.0, "learning_rate": 1e-2}


def prune_half(directory, seed=0):
    """Two random zeros in every four weights along the inputs of all linear layers; returns what is zero."""
    weights = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    zeros = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            order = torch.rand(weight.numel() // 4, 4, generator=generator).argsort(-1)
            zeros[name] = (order < 2).view_as(weight)
            weights[name] = weight.masked_fill(zeros[name], 0)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return zeros


@pytest.fixture
def pruned(tmp_path):
    directory = tmp_path / "pruned"
    save_model(directory)
    return str(directory), prune_half(directory)


def sparse_config(model, **changes):
    return run_config({"student.model": model, "student.keep_zeros": True, **changes})


def assert_zeros_kept(out, start, zeros):
    before, after = load_file(f"{start}/model.safetensors"), weights_of(out)
    for name, zero in zeros.items():
        assert torch.equal(after[name] == 0, zero), name
        assert bool(((after[name] == 0).view(-1, 4).sum(-1) == 2).all()), f"{name} is no longer 2:4"
        assert not torch.equal(after[name], before[name]), f"{name} has not trained"


@pytest.mark.parametrize("name", typing.get_args(OptimizerName))
def test_every_optimizer_keeps_them(tmp_path, pruned, name):
    model, zeros = pruned
    noise = SETTINGS.get(name, LOUD if "perturb" in name or name in ("asgld", "agld") else {"learning_rate": 1e-2})
    settings = {f"optimizer.{key}": value for key, value in noise.items()}
    train.run(sparse_config(model, **{"optimizer.name": name}, **settings), tmp_path / "out")
    assert_zeros_kept(tmp_path / "out", model, zeros)


def test_without_the_flag_they_fill(tmp_path, pruned):
    model, zeros = pruned
    train.run(run_config({"student.model": model}), tmp_path / "out")
    assert all(float((weights_of(tmp_path / "out")[name] == 0).float().mean()) < 0.01 for name in zeros)


def test_their_gradients_count_for_nothing(tmp_path, pruned):
    """The norm that is logged and clipped is that of the weights that can move."""
    model, zeros = pruned
    config = sparse_config(model, **{"training.batch_size": 9, "training.max_steps": 1})
    train.run(config, tmp_path / "out")
    gradients = one_step(config).gradients
    free = {name: g.masked_fill(zeros[name], 0) if name in zeros else g for name, g in gradients.items()}
    whole, expected = (sum(float(g.square().sum()) for g in gs.values()) ** 0.5 for gs in (gradients, free))
    assert expected < whole * 0.999
    assert metrics_of(tmp_path / "out")[0]["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def test_resumed_run_is_the_same(tmp_path, pruned, monkeypatch):
    model, zeros = pruned
    config = sparse_config(model, **{"training.save_every_steps": 1})
    train.run(config, tmp_path / "whole")
    step = train._step

    def interrupted(setup, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(setup, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "out")
    train.run(config, tmp_path / "out", how=How(resume=True))
    assert_same_bits(tmp_path / "out", tmp_path / "whole")
    assert_zeros_kept(tmp_path / "out", model, zeros)


def test_two_ranks_keep_the_same(tmp_path, pruned):
    model, zeros = pruned
    config = sparse_config(model)
    train.run(config, tmp_path / "one")
    train_on_ranks(config, tmp_path / "two")
    assert_zeros_kept(tmp_path / "two", model, zeros)
    for name, weight in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(weights_of(tmp_path / "two")[name], weight, rtol=0, atol=1e-6)


def test_only_layers_with_enough_zeros_count(tmp_path):
    model = load_model(save_model(tmp_path / "model", tied=True))
    layers = dict(model.named_parameters())
    chance = layers["model.layers.0.mlp.up_proj.weight"]
    pruned = layers["model.layers.0.mlp.down_proj.weight"]
    with torch.no_grad():
        chance.view(-1)[: int(0.04 * chance.numel())] = 0
        pruned.view(-1)[: int(0.06 * pruned.numel())] = 0
        layers["model.embed_tokens.weight"][:20] = 0
        zeros = KeptZeros(model)
        for weight in layers.values():
            weight.add_(1.0)
    zeros.clear_weights()
    assert [name for name, weight in layers.items() if (weight == 0).any()] == ["model.layers.0.mlp.down_proj.weight"]
    assert int((pruned == 0).sum()) == int(0.06 * pruned.numel())


def test_a_dense_student_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no layer of the student has 5% zeros or more; start from a pruned model"):
        train.run(sparse_config(save_model(tmp_path / "dense")), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_adapters_are_refused():
    with pytest.raises(ConfigError, match=r"keep_zeros needs all weights to train.*lora"):
        run_config({"student.keep_zeros": True, "lora.rank": 2})


def test_it_stands_in_the_manifest(tmp_path, pruned):
    train.run(sparse_config(pruned[0], **{"training.max_steps": 1}), tmp_path / "out")
    tree = json.loads((tmp_path / "out" / "limbeck.json").read_text())
    assert tree["config"]["student"]["keep_zeros"] is True
