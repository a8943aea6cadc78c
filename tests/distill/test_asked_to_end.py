"""SIGTERM, as schedulers send it: the step ends, a state is saved, and whoever goes on ends with the same bits."""

import os
import signal

import pytest
import torch
from tiny_runs import metrics_of, run_config, weights_of

from limbeck.checkpoint import local_directory
from limbeck.distill import train
from limbeck.errors import ConfigError, LimbeckError
from limbeck.runner.signals import asked_to_end
from limbeck.stage import How


@pytest.mark.parametrize("every", [0, 2])
def test_a_run_that_is_asked_to_end_is_saved(every, tmp_path, monkeypatch):
    config = run_config({"training.save_every_steps": every})
    train.run(config, tmp_path / "whole")
    step = train._step

    def interrupted(setup, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(setup, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", interrupted)
        with pytest.raises(LimbeckError, match=r"saved behind step 2; --resume goes on"):
            train.run(config, tmp_path / "out")
    train.run(config, tmp_path / "out", how=How(resume=True))
    assert metrics_of(tmp_path / "out") == metrics_of(tmp_path / "whole")
    for name, weight in weights_of(tmp_path / "whole").items():
        assert torch.equal(weights_of(tmp_path / "out")[name], weight)


def test_the_first_signal_is_noted_and_the_next_one_counts():
    before = signal.getsignal(signal.SIGTERM)
    with asked_to_end() as is_asked:
        assert not is_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_asked() and signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("out", ["s3://bucket/run", "gs://bucket", "hf://datasets/a/b", "s3:/bucket/run"])
def test_an_output_on_another_store_is_refused(out):
    with pytest.raises(ConfigError, match="outputs are written to local directories"):
        local_directory(out)
    assert str(local_directory("runs/a:b")) == "runs/a:b"
