"""Cuts that move: the schedule is exact, the plan knows it, a restart changes nothing, and a controller reacts."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import assert_same_bits, metrics_of, pull_plug, run_config, save_model

from limbeck.checkpoint import Checkpoint
from limbeck.cost.hardware import Hardware
from limbeck.distill import caching, train
from limbeck.distill.caching import CacheStageConfig
from limbeck.distill.data import prepare
from limbeck.distill.moving_cut import fraction_at
from limbeck.distill.parallel import Ranks
from limbeck.distill.predict import predict_distill
from limbeck.distill.setup import set_up
from limbeck.distill.step_work import work_of
from limbeck.distill.stop_control import StopControlConfig
from limbeck.errors import ConfigError
from limbeck.models.load import load_tokenizer
from limbeck.stage import How
from limbeck.teacher.cache import CacheConfig
from limbeck.traces.truncate import exact_fraction

ALONE = Ranks(0, 1, torch.device("cpu"))
SCHEDULE = {"truncation.lead_fraction": 0.3, "cut_schedule": {"final_fraction": 0.9}, "training.max_steps": 5}


@given(st.fractions(0, 1), st.fractions(0, 1), st.integers(1, 400))
def test_the_way_is_straight_and_ends_where_it_should(first, last, steps):
    found = [fraction_at(first, last, step, steps) for step in range(steps + 3)]
    assert found[steps - 1 :] == [last] * 4
    if steps > 1:
        assert found[0] == first
        assert {b - a for a, b in pairwise(found[:steps])} == {(last - first) / (steps - 1)}
    assert fraction_at(Fraction(1, 4), Fraction(1), 1, 4) == Fraction(1, 2)


@pytest.mark.parametrize("policy", ["lead", "common_length", "random_horizon"])
def test_every_step_has_the_share_that_the_schedule_says(policy):
    config = run_config({**SCHEDULE, "truncation.policy": policy})
    run = set_up(config, ALONE)
    data = run.data
    whole = sum(len(sample) for sample in data.moving.samples)
    for step in range(5):
        examples = data.moving.examples(step, 5, range(len(data.train)))
        share = sum(map(len, examples)) / whole
        slack = {"lead": 0.02, "common_length": 0.03, "random_horizon": 0.25}[policy]
        assert share == pytest.approx(0.3 + 0.15 * step, abs=slack)
        work = work_of(run, step)
        trained = [example for group in work.microbatches for example in group]
        chosen = [examples[i].sample.input_ids.tolist() for i in run.steps[step].indices]
        assert sorted(e.sample.input_ids.tolist() for e in trained) == sorted(chosen)
        assert work.loss.totals.ce == pytest.approx(sum(e.weight_sums[0] for e in trained))
    last = data.moving.examples(4, 5, range(len(data.train)))
    assert [len(example) for example in data.train] == [len(example) for example in last]


def test_a_schedule_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    config = run_config({**SCHEDULE, "truncation.policy": "common_length", "training.save_every_steps": 1})
    train.run(config, tmp_path / "whole")
    pull_plug(monkeypatch, config, tmp_path / "out", 3)
    train.run(config, tmp_path / "out", how=How(resume=True))
    assert_same_bits(tmp_path / "out", tmp_path / "whole")
    ledgers = [Checkpoint(tmp_path / name).cost for name in ("out", "whole")]
    assert ledgers[0]["flops"] == ledgers[1]["flops"] and ledgers[0]["tokens"] == ledgers[1]["tokens"]


def test_a_schedule_may_end_before_the_run_does():
    config = run_config({**SCHEDULE, "cut_schedule": {"final_fraction": 1.0, "steps": 3}})
    moving = prepare(config, load_tokenizer("tiny-student")).moving
    shares = [exact_fraction(moving.at(step, 5).lead_fraction) for step in range(5)]
    assert shares == [Fraction(3, 10), Fraction(13, 20), 1, 1, 1]


CONTROL = {"bound": 0.9, "by": 0.4, "most": 0.6, "every_steps": 2, "num_prompts": 3, "max_new_tokens": 4}


@pytest.mark.parametrize("raises", ["whole", "ending"])
def test_a_student_that_does_not_stop_gets_more_whole_traces(tmp_path, monkeypatch, raises):
    changes = {"truncation.lead_fraction": 0.4, "training.save_every_steps": 1, "training.max_steps": 5}
    config = run_config({**changes, "stop_control": {**CONTROL, "raises": raises}})
    checkpoint = train.run(config, tmp_path / "whole")
    rows = metrics_of(tmp_path / "whole")
    # A student from scratch stops by chance only, so each of three looks raises the share until it is at its most.
    assert [row.get("stop_rate") is not None for row in rows] == [True, False, True, False, True]
    assert [row["raised_share"] for row in rows] == pytest.approx([0.4, 0.4, 0.6, 0.6, 0.6])
    assert checkpoint.cost["flops"]["sampling"] > 0 and checkpoint.cost["rollout_tokens"] == 36
    run = set_up(config, ALONE)
    examples = run.data.moving.examples(0, 5, range(len(run.data.train)), 0.6)
    pairs = list(zip(examples, run.data.moving.samples, strict=True))
    ends = [int(e.sample.input_ids[-1]) == int(sample.input_ids[-1]) for e, sample in pairs]
    assert 0 < sum(ends) < len(ends)
    is_whole = [len(e) == len(sample) for e, sample in pairs]
    assert is_whole == (ends if raises == "whole" else [False] * len(ends))
    pull_plug(monkeypatch, config, tmp_path / "out", 3)
    train.run(config, tmp_path / "out", how=How(resume=True))
    assert_same_bits(tmp_path / "out", tmp_path / "whole")


def test_the_share_rises_only_below_the_bound_and_never_falls():
    control = StopControlConfig(bound=0.8, by=0.3, most=0.5)
    assert control.raised(0.0, 0.79) == 0.3
    assert control.raised(0.3, 0.1) == 0.5
    assert control.raised(0.5, 0.0) == 0.5
    assert control.raised(0.7, 0.0) == 0.7
    assert control.raised(0.2, 0.8) == 0.2


def test_looks_are_predicted_where_the_student_does_not_stop(tmp_path):
    teacher = save_model(tmp_path / "teacher")
    config = run_config(
        {"teacher.model": teacher, "truncation.lead_fraction": 0.5, "stop_control": {**CONTROL, "by": 1e-9}}
    )
    hardware = Hardware("here", {"float32": 5e10}, 1e10, 8e9)
    predicted = predict_distill(config, hardware=hardware)
    ledger = train.run(config, tmp_path / "out").manifest["ledger"]
    assert predicted.flops["sampling"] == pytest.approx(ledger["flops"]["sampling"], rel=0.1)
    assert predicted.flops["student"] == ledger["flops"]["student"]
    assert any("go on stopping" in note or "goes on stopping" in note for note in predicted.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cut_schedule": {"final_fraction": 0.0}}, "lead_fraction must be in"),
        ({"cut_schedule": {"steps": 0}}, "at least 1"),
        ({"cut_schedule": {}, "truncation": {"policy": "budget", "budget_tokens": 9}}, "does not take"),
        ({"cut_schedule": {}, "training.max_tokens": 900}, "batch_size and epochs"),
        ({"stop_control": {"bound": 0.0}}, "bound"),
        ({"stop_control": {"every_steps": 0}}, "every_steps"),
        ({"stop_control": {}, "num_validation": 0}, "held-out prompts"),
        ({"stop_control": {}, "truncation": {"policy": "random_horizon", "lead_fraction": 0.5}}, "random_horizon"),
    ],
)
def test_what_cannot_move_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        run_config(changes)


def test_whole_traces_among_cut_ones_are_those_of_the_seed():
    def lengths(share: float) -> np.ndarray:
        config = run_config({"truncation.lead_fraction": 0.5, "truncation.whole_fraction": share})
        return np.array([len(example) for example in prepare(config, load_tokenizer("tiny-student")).train])

    cut, some, whole = lengths(0.0), lengths(0.4), lengths(1.0)
    assert np.all((some == cut) | (some == whole)) and 0 < np.sum(some == whole) < len(whole)


@pytest.mark.parametrize("mode", ["hidden", "top_k", "sampled"])
@pytest.mark.parametrize(
    "cut",
    [
        {"truncation.policy": "common_length", "truncation.lead_fraction": 0.5},
        {"truncation.policy": "random_horizon", "truncation.lead_fraction": 0.5},
        {**SCHEDULE, "truncation.policy": "common_length"},
        {"truncation.lead_fraction": 0.4, "truncation.whole_fraction": 0.3},
    ],
    ids=["common length", "random horizon", "schedule", "whole share"],
)
def test_one_cache_of_whole_traces_serves_every_cut(tmp_path, mode, cut):
    teacher = save_model(tmp_path / "teacher", sharpness=30.0)
    live = run_config({"teacher.model": teacher, "training.max_steps": 2, **cut})
    stored = CacheStageConfig(teacher=teacher, traces=live.traces, cache=CacheConfig(mode=mode, num_samples=4))
    caching.run(stored, tmp_path / "cache")
    cached = run_config({"teacher.model": teacher, "teacher.cache": tmp_path / "cache", "training.max_steps": 2, **cut})
    train.run(cached, tmp_path / "cached")
    train.run(live, tmp_path / "live")
    losses = [[row["kd_term"] for row in metrics_of(tmp_path / name)] for name in ("cached", "live")]
    if mode == "hidden":
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(loss > 0 for loss in losses[0])
