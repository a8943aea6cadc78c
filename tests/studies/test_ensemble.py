"""The ensemble study: networks side by side are networks alone, and a chain is better calibrated than its start."""

import pytest
import torch

from limbeck.errors import ConfigError
from studies import ensemble

SMALL = {"train_requests": 40, "test_requests": 200, "members": 6, "train_steps": 500, "sample_steps": 3_000}


def test_pairs_hold_the_words_of_both_sides():
    train, test = ensemble.make_data(ensemble.EnsembleConfig(**SMALL))
    assert train.features.shape[1] == test.features.shape[1]
    assert len(train.labels) == 40 * 8
    assert train.requests.max() == 39
    assert ((test.probabilities > 0) & (test.probabilities < 1)).all()
    # A word or none for each of four topics of the member, one quality and one topic of the item.
    assert (train.features.sum(1) <= 4 + 2).all()


def test_networks_side_by_side_learn_as_each_does_alone():
    config = ensemble.EnsembleConfig(**{**SMALL, "train_steps": 40})
    train, _ = ensemble.make_data(config)
    together = ensemble.Nets(3, train.features.shape[1], 4, seed=5)
    alone = ensemble.Nets(1, train.features.shape[1], 4, seed=0)
    alone.load_state_dict({name: value[1:2].clone() for name, value in together.state_dict().items()})
    for nets in (together, alone):
        ensemble.fit(config, nets, train)
    torch.testing.assert_close(together(train.features)[1], alone(train.features)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_chain_has_the_lower_log_loss_and_calibration_error(tmp_path):
    result = ensemble.run(ensemble.EnsembleConfig(**SMALL), tmp_path / "out")
    for key in ensemble.KEYS:
        assert result["the truth"][key] < result["sgld"][key] < result["single"][key]
    assert "| sgld |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 1000


@pytest.mark.parametrize("wrong", [{"members": 0}, {"members": 10, "sample_steps": 19}], ids=str)
def test_configs_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError):
        ensemble.EnsembleConfig(**wrong)
