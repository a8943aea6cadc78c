"""The saddles study: starts that are what they say, gradients that are counted, verdicts that follow from intervals."""

import pytest
import torch

from limbeck.errors import ConfigError
from studies import saddles
from studies.methods import METHODS, Settings
from studies.problems import QuarticSaddle
from studies.swarm import Swarm, run_until


@pytest.fixture(autouse=True, scope="module")
def short_training():
    """Reference losses of a few steps: the laws below do not depend on them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(saddles, "TRAIN_STEPS", 60)
    yield
    patch.undo()
    for cached in (saddles.starts, saddles.reference_loss, saddles.half_zeroed):
        cached.cache_clear()


@pytest.mark.parametrize("name", saddles.STARTS)
def test_every_start_is_above_its_target(name):
    start = saddles.starts(name)
    points = start.begin(range(3))
    assert points.shape == (3, *start.problem.shape)
    assert (start.problem.loss(points) > start.target).all()


@pytest.mark.parametrize("name", ["lora", "bottleneck"])
def test_at_zero_every_samples_gradient_is_exactly_zero(name):
    start = saddles.starts(name)
    points = start.begin(range(4))
    batch = start.problem.draw(4, 1, torch.Generator().manual_seed(0))
    assert not start.problem.batch_gradient(points, batch).any()


def test_units_that_were_pruned_to_zero_get_no_gradient_from_any_sample():
    start = saddles.starts("zeroed_units")
    net = start.problem
    slope = net.batch_gradient(start.begin(range(2)), net.draw(2, 3, torch.Generator().manual_seed(0)))
    split = net.num_hidden * net.num_inputs
    first, second = slope[:, :split].view(2, 4, -1), slope[:, split:].view(2, -1, 4)
    assert first[:, :2].any()
    assert not first[:, 2:].any()
    assert not second[:, :, 2:].any()


def test_cloned_units_get_the_same_gradient_from_every_sample():
    start = saddles.starts("cloned_units")
    net = start.problem
    slope = net.batch_gradient(start.begin(range(2)), net.draw(2, 3, torch.Generator().manual_seed(0)))
    first = slope[:, : net.num_hidden * net.num_inputs].view(2, 4, -1)
    torch.testing.assert_close(first, first[:, :1].expand_as(first))


@pytest.mark.parametrize(("name", "a_step"), [("sgd", 1), ("sam", 2)])
def test_gradients_are_counted_where_they_are_taken(name, a_step):
    starts = torch.tensor([[0.3, 0.1], [0.6, 0.1]])
    swarm = Swarm(QuarticSaddle(num_dims=2), METHODS[name], Settings(lr=0.3, noise_radius=1e-3), starts, [0, 1])
    arrivals = run_until(swarm, lambda points, step: points[:, 0].abs() >= 0.5, 60)
    assert arrivals.steps[1] == arrivals.gradients[1] == 0
    assert arrivals.gradients[0] == a_step * arrivals.steps[0] > 0


def test_a_search_of_neon_counts_all_its_gradients():
    swarm = Swarm(
        QuarticSaddle(num_dims=3),
        METHODS["neon"],
        Settings(lr=0.3, noise_radius=0.5, grad_threshold=0.01),
        torch.zeros(1, 3),
        [0],
    )
    swarm.step(None)
    assert swarm.gradients[0] > 10
    assert float(swarm.points.norm()) == pytest.approx(0.5, rel=1e-3)


def test_one_kick_moves_the_point_of_its_own_run_only():
    swarm = Swarm(
        QuarticSaddle(num_dims=50), METHODS["jitter_gd"], Settings(lr=0.1, noise_radius=0.2), torch.zeros(2, 50), [0, 1]
    )
    assert swarm.points.norm(dim=1).tolist() == pytest.approx([0.2, 0.2], rel=0.4)
    assert not torch.equal(swarm.points[0], swarm.points[1])


def test_the_study_tunes_until_the_best_step_lies_inside_and_names_a_winner(tmp_path):
    config = saddles.SaddlesConfig(
        problems=("quartic",),
        methods=("asgld", "jitter_sgd", "sgd"),
        lrs=(0.01, 0.03),
        tune_seeds=1,
        num_seeds=5,
        max_steps=300,
        num_workers=1,
    )
    result = saddles.run(config, tmp_path / "out")
    found = result["problems"]["quartic"]
    assert all(method["is_inside"] for method in found.values())
    assert sum(result["counts"]["asgld"].values()) == 1
    text = (tmp_path / "out" / "table.md").read_text()
    assert "asgld against the best control" in text
    assert saddles.measure(config, tmp_path / "again.jsonl") == result


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [([10] * 11, [20] * 11, "win"), ([20] * 11, [10] * 11, "loss"), ([None] * 11, [9] * 11, "loss")],
)
def test_a_verdict_follows_from_intervals_that_do_not_meet(ours, theirs, verdict):
    methods = {"asgld": {"gradients": ours}, "slow": {"gradients": [500] * 11}, "sgd": {"gradients": theirs}}
    assert saddles._verdict(methods, "asgld") == verdict


def test_intervals_that_meet_are_a_tie():
    methods = {"asgld": {"gradients": list(range(10, 21))}, "sgd": {"gradients": list(range(11, 22))}}
    assert saddles._verdict(methods, "asgld") == "tie"


@pytest.mark.parametrize(
    "wrong",
    [
        {"methods": ("asgld", "sgdd")},
        {"methods": ("sgd", "adam")},
        {"problems": ("quartics",)},
        {"lrs": (0.1,)},
        {"lrs": (0.3, 0.1)},
        {"num_seeds": 0},
    ],
    ids=str,
)
def test_configs_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError):
        saddles.SaddlesConfig(**wrong)
