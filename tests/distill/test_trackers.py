"""Trackers get what metrics.jsonl gets, under any of their names, and a missing package is one line."""

import sys
import types

import pytest
from tiny_runs import metrics_of, run_config

from limbeck.distill import train
from limbeck.errors import ConfigError


class Seen(types.SimpleNamespace):
    def __init__(self):
        super().__init__(rows=[], started=[], ended=0)

    def module(self, name):
        def log(numbers, step):
            self.rows.append((step, dict(numbers)))

        def start(**given):
            self.started.append(given)

        def end():
            self.ended += 1

        class Writer:
            def __init__(self, folder):
                start(folder=folder)
                self.row = {}

            def add_scalar(self, key, value, step):
                if not seen.rows or seen.rows[-1][0] != step:
                    seen.rows.append((step, {}))
                seen.rows[-1][1][key] = value

            def close(self):
                end()

        seen = self
        names = {"init": start, "log": log, "finish": end, "start_run": start, "end_run": end, "log_metrics": log}
        made = types.ModuleType(name)
        vars(made).update(names, log_dict=lambda tree, file: start(config=tree), SummaryWriter=Writer)
        return made


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_tracker_sees_every_step(name, tmp_path, monkeypatch):
    seen = Seen()
    monkeypatch.setitem(sys.modules, name, seen.module(name))
    if name == "tensorboard":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", seen.module(name))
    train.run(run_config({"training.track": [name]}), tmp_path / "out")
    rows = metrics_of(tmp_path / "out")
    assert [step for step, _ in seen.rows] == [row["step"] for row in rows] and seen.ended == 1 and seen.started
    for (_, numbers), row in zip(seen.rows, rows, strict=True):
        assert numbers["tokens_per_second"] > 0
        assert {key: value for key, value in row.items() if key in numbers} == {
            key: value for key, value in numbers.items() if key != "tokens_per_second"
        }
        assert {"loss", "gradient_norm", "tokens"} <= numbers.keys()


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"training.track wandb: wandb is not installed; pip install wandb"):
        train.run(run_config({"training.track": ["wandb"]}), tmp_path / "out")
