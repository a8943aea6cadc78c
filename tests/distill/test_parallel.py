"""Two gloo processes, started as torchrun starts them, equal one: losses, weights and costs."""

import pytest
import torch
from tiny_runs import metrics_of, run_config, save_model, train_on_ranks, weights_of

from limbeck.checkpoint import Checkpoint
from limbeck.distill import train

CASES = {
    "uneven shares, sequence mean": {"training.batch_size": 3, "loss.normalization": "sequence_mean"},
    "a rank without an example": {"training.batch_size": 1, "training.max_steps": 3},
    "a step without supervision": {
        "training.batch_size": 1,
        "training.max_steps": 9,
        "traces.chain_max_steps": 6,
        "truncation.lead_fraction": 0.2,
        "supervision.preset": "cot",
        "optimizer.weight_decay": 0.5,
    },
}


def costs(out):
    ledger = Checkpoint(out).manifest["ledger"]
    names = ("tokens", "supervised_tokens", "sequences", "steps")
    return {name: ledger[name] for name in names} | {"head": ledger["flops"]["head"]}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(tmp_path, case):
    teacher = save_model(tmp_path / "teacher", sharpness=30.0)
    config = run_config({"teacher.model": teacher, "training.save_every_steps": 2, **CASES[case]})
    train.run(config, tmp_path / "one")
    train_on_ranks(config, tmp_path / "two")
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        assert mine["tokens"] == theirs["tokens"]
    theirs = weights_of(tmp_path / "one")
    for name, weight in weights_of(tmp_path / "two").items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6)
    assert costs(tmp_path / "two") == costs(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "one", "two"}
