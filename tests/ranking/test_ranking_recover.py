"""rank recover: cuts and steps add up, the scorer's own pairs calibrate it, and a killed run goes on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import SHAPE, weights_of

from limbeck.checkpoint import Checkpoint
from limbeck.compress.masks import read_masks
from limbeck.config import build
from limbeck.errors import CheckpointError, ConfigError
from limbeck.models.load import load_model
from limbeck.ranking import recover, train
from limbeck.ranking.evaluate import RankEvaluateConfig
from limbeck.ranking.recover import RankRecoverConfig
from limbeck.ranking.train import RankTrainConfig
from limbeck.stage import How


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    out = tmp_path_factory.mktemp("scorer") / "out"
    tree = {
        "student": {"scratch": {**SHAPE, "seed": 1}},
        "data": {"source": "synthetic", "synthetic": {"requests": 40, "candidates": 3, "history": 1, "topics": 2}},
        "vocabulary_tokens": 300,
        "training": {"batch_size": 4, "max_steps": 8},
        "optimizer": {"learning_rate": 1e-2},
    }
    train.run(build(RankTrainConfig, tree), out)
    return str(out)


def config(scorer, **changes):
    tree = {
        "prune": {"model": scorer, "neuron_sparsity": 0.5, "multiple_of": 8, "gate": {"sequences": 2}},
        "rank": {"training": {"batch_size": 4, "max_steps": 5}, "optimizer": {"learning_rate": 1e-3}},
        "rounds": 2,
    }
    for path, value in changes.items():
        group, _, name = path.partition("__")
        if name:
            tree[group][name] = value
        else:
            tree[group] = value
    return build(RankRecoverConfig, tree)


def test_rounds_end_at_the_target_with_all_steps(scorer, tmp_path):
    made = config(scorer)
    assert made.rank.data == build(RankTrainConfig, Checkpoint(Path(scorer)).manifest["config"]).data
    assert made.rank.teacher.model == scorer
    out = recover.run(made, tmp_path / "out")
    metrics, rows = out.manifest["metrics"], out.manifest["metrics"]["rounds"]
    assert [row["neurons"] for row in rows] == [[32, 24], [24, 16]]
    assert sum(row["steps"] for row in rows) == out.manifest["ledger"]["steps"] == 5
    assert metrics["auc"] == rows[-1]["recovered"]["auc"] and 0 <= rows[0]["pruned"]["auc"] <= 1
    assert metrics["unpruned"].keys() == rows[0]["recovered"].keys()
    assert load_model(str(out.path)).config.intermediate_size == 16
    asked = build(RankEvaluateConfig, {"model": str(out.path)})
    assert asked.data == made.rank.data and asked.features == made.rank.features
    assert build(RankRecoverConfig, {"prune": str(out.path), "rank": {}}).rank.data == made.rank.data
    text = (tmp_path / "out/calibration.txt").read_text()
    pairs = text.split("\n\n")
    assert len(pairs) == 28 * 3 and all(pair.endswith(("Answer: yes", "Answer: no")) for pair in pairs)


def assert_same_weights(one, other):
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_single_weights_stay_zero(scorer, tmp_path):
    cut = {"model": scorer, "method": "wanda", "pattern": "0.5", "gate": {"sequences": 2}}
    out = recover.run(config(scorer, prune=cut, rounds=1), tmp_path / "out").path
    masks, weights = read_masks(out), load_file(next(out.glob("model-*.safetensors")))
    assert masks and all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())


def test_a_stopped_run_goes_on_with_the_same_bits(scorer, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recover.run(config(scorer), whole)
    once, calls = recover.train.run, []

    def stops(*arguments, **switches):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return once(*arguments, **switches)

    with monkeypatch.context() as patch:
        patch.setattr(recover.train, "run", stops)
        with pytest.raises(KeyboardInterrupt):
            recover.run(config(scorer), parts)
    with pytest.raises(CheckpointError, match="another config"):
        recover.run(config(scorer, rank__loss={"kd_ratio": 0.2}), parts, how=How(resume=True))
    recover.run(config(scorer), parts, how=How(resume=True))
    assert_same_weights(whole, parts)
    metrics = [(out / "round-2/recovered/metrics.jsonl").read_bytes() for out in (whole, parts)]
    assert metrics[0] == metrics[1]


def test_what_cannot_work_is_refused(scorer, tmp_path):
    with pytest.raises(ConfigError, match="rounds must be at least 1"):
        config(scorer, rounds=0)
    with pytest.raises(ConfigError, match="leave the student out"):
        config(scorer, rank__student={"model": "tiny-student"})
    with pytest.raises(ConfigError, match="fewer than the 4 rounds"):
        recover.run(config(scorer, rounds=4, rank__training={"max_steps": 2}, prune__multiple_of=4), tmp_path / "out")
    with pytest.raises(ConfigError, match="data"):
        build(RankRecoverConfig, {"prune": {"model": "tiny-student"}, "rank": {}})
