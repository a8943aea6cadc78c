"""Whole traces at the cost of a cut, planned before anything is trained."""

from __future__ import annotations

import pytest

from limbeck.config import build
from limbeck.distill.predict import step_flops
from limbeck.errors import ConfigError
from limbeck.models.load import load_tokenizer
from limbeck.sweep.controls import cost_of, with_controls
from limbeck.sweep.execute import asked_of_teacher
from limbeck.sweep.plan import SweepConfig, is_uncut, plan_runs, reference_of

TOKENIZER = load_tokenizer("tiny-student")
TRACES = {"source": "builtin:recheck", "num_traces": 90, "recheck": {"most_steps": 4}}
DISTILL = {
    "student": {"model": "tiny-student"},
    "teacher": {"model": "tiny-teacher"},
    "traces": TRACES,
    "num_validation": 10,
    "training": {"batch_size": 4},
}


def sweep(**more):
    return build(SweepConfig, {"distill": DISTILL, "problems": TRACES | {"seed": 1}, **more})


def test_a_control_costs_what_its_cut_costs_and_keeps_whole_traces():
    runs = with_controls(plan_runs(sweep(grid={"lead_fraction": [0.3, 0.6, 1.0], "training.seed": [0, 1]})))
    controls = {run.control_of[0]: run for run in runs if run.control_of}
    cuts = [run for run in runs if not is_uncut(run.config)]
    assert list(controls) == [run.name for run in cuts] and len(cuts) == 4
    (whole,) = (run for run in runs if run.name == "lead_fraction-1.0_seed-0")
    longest = max(step_flops(whole.config, TOKENIZER))
    for cut in cuts:
        control = controls[cut.name]
        assert is_uncut(control.config) and control.config.training.seed == cut.config.training.seed
        assert abs(cost_of(control.config, TOKENIZER) - cost_of(cut.config, TOKENIZER)) <= longest / 2
        assert control.axes == whole.axes | {"seed": control.config.training.seed}


@pytest.mark.parametrize(
    "cut",
    [
        {"truncation.policy": "common_length", "lead_fraction": 0.5},
        {"lead_fraction": 0.3, "cut_schedule": {"final_fraction": 0.6}},
        {"lead_fraction": 0.4, "stop_control": {"max_new_tokens": 8, "every_steps": 5}},
    ],
)
def test_cuts_that_keep_more_have_their_control_and_their_reference(cut):
    runs = with_controls(plan_runs(sweep(runs=[cut, {"lead_fraction": 1.0}])))
    cut_run, whole, control = runs
    assert control.control_of == (cut_run.name,) and reference_of(cut_run, runs) == whole
    assert is_uncut(control.config) and control.config.stop_control is control.config.cut_schedule is None
    longest = max(step_flops(whole.config, TOKENIZER))
    assert abs(cost_of(control.config, TOKENIZER) - cost_of(cut_run.config, TOKENIZER)) <= longest / 2


def test_no_run_is_compared_with_a_control():
    runs = with_controls(plan_runs(sweep(grid={"lead_fraction": [0.5, 1.0]})))
    assert [reference_of(run, runs).name for run in runs] == ["lead_fraction-1.0"] * 3
    runs = with_controls(plan_runs(sweep(grid={"lead_fraction": [0.5]})))
    assert len(runs) == 2 and reference_of(runs[0], runs) is None


def test_cuts_of_one_cost_share_a_control():
    share = {"lead_fraction": 0.5}
    runs = with_controls(plan_runs(sweep(runs=[share, share | {"kd_ratio": 1.0}, share | {"truncation.seed": 3}])))
    assert [run.control_of for run in runs if run.control_of] == [
        (runs[0].name, runs[2].name),
        (runs[1].name,),
    ]


def test_a_cut_that_leaves_nothing_is_refused_by_name_before_any_run():
    nothing = sweep(
        grid={"lead_fraction": [0.1, 1.0]}, runs=[], distill=DISTILL | {"supervision": {"preset": "answer"}}
    )
    for plan in (with_controls, lambda runs: asked_of_teacher(nothing, runs)):
        with pytest.raises(ConfigError, match=r"run lead_fraction-0.1: no supervised token is left in 80 traces"):
            plan(plan_runs(nothing))
