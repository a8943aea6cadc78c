"""Every optimizer that a recipe can name: trains, adds its noise when asked, and resumes to the same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import assert_same_bits, run_config

from limbeck.distill import train
from limbeck.errors import ConfigError
from limbeck.optim.build import NoiseConfig, OptimizerConfig, build_optimizer
from limbeck.stage import How

OPEN = {"grad_threshold": 1e3, "noise_radius": 1e-2, "escape_steps": 0, "quiet_fraction": 0.0}
NAMES = {
    "adamw": {},
    "sgd": {},
    "asgld": OPEN,
    "agld": OPEN,
    "asg": OPEN,
    "sgld": {"temperature": 1e-6, "quiet_fraction": 0.0},
    "psgld": {"temperature": 1e-6, "quiet_fraction": 0.0},
    "noisy_sgd": {"noise_radius": 0.5, "quiet_fraction": 0.0},
    "perturb(adamw)": OPEN,
    "perturb(sgd)": OPEN,
}


def config(name, **noise):
    changes = {f"optimizer.noise.{field}": value for field, value in (NAMES[name] | noise).items()}
    return run_config(
        {
            "training.max_steps": 4,
            "training.save_every_steps": 1,
            "optimizer.name": name,
            "optimizer.learning_rate": 1e-3,
            **changes,
        }
    )


def weights(checkpoint):
    return load_file(checkpoint.path / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_resumed_is_uninterrupted(name, tmp_path, monkeypatch):
    train.run(config(name), tmp_path / "whole")
    whole_step = train._step

    def step(setup, number):
        if number == 2:
            raise KeyboardInterrupt
        return whole_step(setup, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            train.run(config(name), tmp_path / "cut")
    train.run(config(name), tmp_path / "cut", how=How(resume=True))
    assert_same_bits(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(("noisy", "plain"), [("perturb(adamw)", "adamw"), ("perturb(sgd)", "sgd")])
def test_without_noise_it_is_the_plain_optimizer_and_with_noise_it_is_not(noisy, plain, tmp_path):
    silent = weights(train.run(config(noisy, quiet_fraction=1.0), tmp_path / "silent"))
    expected = weights(train.run(config(plain), tmp_path / "plain"))
    assert all(torch.equal(silent[name], expected[name]) for name in expected)
    loud = weights(train.run(config(noisy), tmp_path / "loud"))
    moved = {name for name in expected if not torch.equal(loud[name], expected[name])}
    assert any("q_proj" in name for name in moved)


def test_only_matrices_outside_the_embedding_get_noise():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = build_optimizer(model, OptimizerConfig(name="asgld", weight_decay=0.0, noise=_noise()), total_steps=10)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert moved == {"1.weight"}


def test_noise_ends_before_the_last_part():
    model = torch.nn.Linear(3, 3)
    optimizer = build_optimizer(model, OptimizerConfig(name="perturb(sgd)", weight_decay=0.0, noise=_noise()), 10)
    moved = []
    for _ in range(10):
        model.weight.grad, model.bias.grad = torch.zeros(3, 3), torch.zeros(3)
        before = model.weight.detach().clone()
        optimizer.step()
        moved.append(not torch.equal(model.weight.detach(), before))
    assert moved == [True] * 8 + [False] * 2


@pytest.mark.parametrize("name", ["sgld", "psgld", "noisy_sgd"])
def test_noise_without_a_size_is_refused(name):
    with pytest.raises(ConfigError, match=r"temperature|noise_radius"):
        OptimizerConfig(name=name)


def _noise():
    return NoiseConfig(grad_threshold=1.0, noise_radius=0.1, escape_steps=0)


@pytest.mark.parametrize("as_learning_rate", [False, True])
def test_growth_changes_the_batch_or_the_rate(as_learning_rate, tmp_path):
    changes = {
        "training.max_steps": 4,
        "num_validation": 2,  # Ten traces are left: no batch of two is short.
        "training.batch_size": 2,
        "training.batch_growth": {"per_step": 1.0, "largest": 4, "as_learning_rate": as_learning_rate},
        "optimizer.learning_rate": 1e-3,
        "schedule": {"name": "constant", "warmup_fraction": 0.0},
    }
    out = train.run(run_config(changes), tmp_path / "out")
    rows = [json.loads(line) for line in (out.path / "metrics.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] / 1e-3 for row in rows]
    sequences = out.manifest["ledger"]["sequences"]
    assert rates == pytest.approx([1, 2 / 3, 1 / 2, 1 / 2] if as_learning_rate else [1, 1, 1, 1])
    assert sequences == (8 if as_learning_rate else 2 + 3 + 4 + 4)


def lines(checkpoint):
    return [json.loads(line) for line in (checkpoint.path / "metrics.jsonl").read_text().splitlines()]


def test_the_log_has_gate_and_noise_of_every_step(tmp_path):
    rows = lines(train.run(config("perturb(adamw)"), tmp_path / "noisy"))
    assert [row["fires"] for row in rows] == [1, 2, 3, 3]  # the schedule ends at a rate of 0
    assert all(row["noise_norm"] > 0 and 0 < row["gate_statistic"] < 1e3 for row in rows[:3])
    assert {row["gate_threshold"] for row in rows} == {1e3}
    assert "fires" not in lines(train.run(config("adamw"), tmp_path / "plain"))[0]


@pytest.mark.parametrize(("threshold", "is_told"), [(1e-9, True), (1e3, False)])
def test_a_run_whose_gate_never_opened_says_so(threshold, is_told, tmp_path, capfd):
    rows = lines(train.run(config("perturb(adamw)", grad_threshold=threshold), tmp_path / "out"))
    assert (rows[-1]["fires"] == 0) == is_told
    said = " ".join("".join(capfd.readouterr()).split())
    assert ("never opened (grad_threshold" in said) == is_told
