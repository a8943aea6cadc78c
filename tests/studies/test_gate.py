"""The gate study: every way leads into its saddle, and what the gates do there is counted."""

import math

import pytest
import torch

from limbeck.errors import ConfigError
from studies import gate, saddles


@pytest.fixture(autouse=True, scope="module")
def short_training():
    """Reference losses of fewer steps: the laws below need no more."""
    patch = pytest.MonkeyPatch()
    patch.setattr(saddles, "TRAIN_STEPS", 300)
    yield
    patch.undo()
    saddles.reference_loss.cache_clear()


@pytest.mark.parametrize("name", gate.WAYS)
def test_descent_without_noise_ends_at_the_saddle_in_double_precision(name):
    way = gate.WAYS[name]()
    point = way.start.double().unsqueeze(0)
    for _ in range(math.ceil(60 / way.lr)):
        point = way.problem.project(point - way.lr * way.problem.gradient(point))
    assert float(way.problem.gradient(point).norm()) < 0.02
    assert float(way.problem.loss(point)) > way.target > way.lowest


def test_both_gates_leave_where_plain_descent_stays(tmp_path):
    config = gate.GateConfig(saddles=("quartic", "pca"), num_seeds=2, distance=150.0, training_steps=100, num_workers=1)
    result = gate.run(config, tmp_path / "out")
    for way in result["ways"]:
        found = {name: gate.median_steps(way[name]["steps"]) for name in gate.GATES}
        assert math.isfinite(found["auto"]), way
        assert math.isfinite(found["fixed"]), way
        assert math.isinf(found["plain"]), way
    assert set(result["training"]) == set(gate.TRAININGS)
    assert "Steps until the saddle is left" in (tmp_path / "out" / "table.md").read_text()


def test_fires_in_training_are_those_of_the_optimizer():
    config = gate.GateConfig(training_steps=60)
    assert gate.measure_cell(config, ("training", "tanh_net, batch 32", 1.0)) == {"fires": 0}


@pytest.mark.parametrize("wrong", [{"saddles": ("quartics",)}, {"num_seeds": 0}, {"noise_radius": 0.0}], ids=str)
def test_configs_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError):
        gate.GateConfig(**wrong)


def test_the_way_of_the_octopus_meets_a_saddle_exactly():
    way = gate.WAYS["octopus"]()
    assert not torch.count_nonzero(way.start[1:])
