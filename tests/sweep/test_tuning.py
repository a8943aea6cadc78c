"""Which learning rate a setting takes, without training: losses are made up."""

from __future__ import annotations

import math

import pytest

from limbeck.config import build
from limbeck.errors import ConfigError, LimbeckError
from limbeck.sweep import execute, tuning
from limbeck.sweep.plan import SweepConfig, plan_runs, reference_of

TRACES = {"source": "builtin:chain", "num_traces": 9}
TREE = {
    "distill": {"student": {"model": "tiny-student"}, "traces": TRACES},
    "problems": TRACES | {"seed": 1},
    "grid": {"lead_fraction": [0.5, 1.0], "training.seed": [0, 1]},
}
RATES = [1e-3, 1e-4, 1e-5]


@pytest.fixture
def tried(monkeypatch):
    """What would be trained; the cut likes a small rate, whole traces a large one, and one rate diverges."""
    calls = []

    def train(function, arguments, on):
        for config, directory in arguments:
            calls.append(directory.name)
            directory.mkdir(parents=True)
            (directory / "limbeck.json").write_text("{}")
            rate = config.optimizer.learning_rate
            loss = rate if config.truncation.lead_fraction == 0.5 else 1 - rate
            yield (config, directory), math.inf if rate == 1e-5 else loss

    monkeypatch.setattr(tuning, "map_in_processes", train)
    return calls


def test_every_setting_takes_its_own_rate_for_all_seeds(tried, tmp_path):
    runs = plan_runs(build(SweepConfig, TREE | {"tune": RATES}))
    found = tuning.tuned(runs, RATES, tmp_path, "local")
    rates = {run.name: run.config.optimizer.learning_rate for run in found}
    assert rates == {
        f"lead_fraction-{lead}_seed-{seed}": rate for lead, rate in ((0.5, 1e-4), (1.0, 1e-3)) for seed in (0, 1)
    }
    assert found[0].tried == ((1e-3, 1e-3), (1e-4, 1e-4), (1e-5, math.inf))
    assert tried == [f"lead_fraction-{lead}_seed-0_learning_rate-{rate:g}" for lead in (0.5, 1.0) for rate in RATES]
    assert reference_of(found[0], found).name == "lead_fraction-1.0_seed-0", "their rates do not keep them apart"


def test_the_chosen_student_is_the_run(tried, tmp_path):
    tuning.tuned(plan_runs(build(SweepConfig, TREE)), RATES, tmp_path, "local")
    run, chosen = (
        tmp_path / name / "limbeck.json"
        for name in (
            "runs/lead_fraction-0.5_seed-0",
            "tuning/lead_fraction-0.5_seed-0_learning_rate-0.0001",
        )
    )
    assert run.samefile(chosen) and not (tmp_path / "runs" / "lead_fraction-0.5_seed-1").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tune": [1e-3, 1e-3]}, "tune must list different learning rates"),
        ({"tune": [-1.0]}, "tune must list different learning rates"),
        ({"tune": [1e-3], "grid": {"learning_rate": [1e-3]}}, "tune and an axis learning_rate are both set"),
        ({"tune": [1e-3], "distill": TREE["distill"] | {"num_validation": 0}}, "set distill.num_validation"),
    ],
)
def test_what_cannot_be_tuned_is_refused(more, message):
    with pytest.raises(ConfigError, match=message):
        build(SweepConfig, TREE | more)


def test_a_run_that_fails_does_not_end_the_others(monkeypatch):
    def attempt(function, config, scoring, directory):
        if directory == "dies":
            raise LimbeckError("the process died (exit code -9); was memory short?")
        return function(config, scoring, directory)

    def run_one(config, scoring, directory):
        if directory != "works":
            raise config

    monkeypatch.setattr(execute, "in_process", attempt)
    monkeypatch.setattr(execute, "_run_one", run_one)
    calls = [
        (None, None, "works"),
        (LimbeckError("step 3: the loss is nan"), None, "diverges"),
        (None, None, "dies"),
        (ZeroDivisionError("by zero"), None, "has a defect"),
    ]
    found = {call[2]: reason for call, reason in execute._attempts(calls, "local")}
    assert found == {
        "works": None,
        "diverges": "step 3: the loss is nan",
        "dies": "the process died (exit code -9); was memory short?",
        "has a defect": "ZeroDivisionError: by zero",
    }
