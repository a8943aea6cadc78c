"""What an objective is given: coefficients that add up over a step, and how few calls lead to the formula."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import run_config

import limbeck
from limbeck.distill.config import LossConfig
from limbeck.distill.divergence import forward_kl
from limbeck.distill.microbatch import MicroBatch, StepLoss, Totals, step_totals
from limbeck.distill.parallel import Ranks
from limbeck.distill.setup import set_up
from limbeck.ledger import Ledger
from limbeck.models.anatomy import Computed
from limbeck.traces.batch import collate, idle

MOST_CALLS = 8
"""From `limbeck.distill` to a divergence."""


@pytest.fixture(scope="module")
def run():
    return set_up(run_config({"training.max_steps": 1}), Ranks(0, 1, torch.device("cpu")))


def given(run, examples, loss, layout="packed"):
    pad_id = run.student.tokenizer.pad_token_id
    batch = collate(examples, layout, pad_id) if examples else idle(layout, pad_id)
    return MicroBatch(run.student, None, batch, examples, loss, Ledger())


@pytest.mark.parametrize("normalization", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_coefficients_of_a_step_add_up_to_the_shares(run, normalization, layout):
    examples = run.data.train[:5]
    loss = StepLoss(LossConfig(normalization=normalization), 0.3, step_totals(examples, normalization))
    parts = [given(run, group, loss, layout).supervised() for group in (examples[:2], examples[2:])]
    assert sum(float(part.ce_coef.sum()) for part in parts) == pytest.approx(0.7, rel=1e-5)
    assert sum(float(part.kd_coef.sum()) for part in parts) == pytest.approx(0.3, rel=1e-5)
    whole = given(run, examples, loss, layout).supervised()
    assert len(whole.rows) == sum(len(part.rows) for part in parts)


def test_a_step_without_weights_has_no_loss_and_no_nan(run):
    loss = StepLoss(LossConfig(), 0.5, Totals(0.0, 0.0))
    supervised = given(run, run.data.train[:2], loss).supervised()
    assert not loss.is_any and not supervised.ce_coef.any() and not supervised.kd_coef.any()
    assert len(supervised.used()[0].rows) == 0
    assert StepLoss(LossConfig(), 0.0, Totals(1.0, 0.0)).is_any
    assert not StepLoss(LossConfig(), 1.0, Totals(1.0, 0.0)).is_any


def test_a_pass_without_examples_costs_nothing(run):
    empty = given(run, [], StepLoss(LossConfig(), 0.0, Totals(1.0, 1.0)))
    empty.count_tokens()
    empty.charge(Computed.whole([1]), head=10, supervised_tokens=1)
    assert not any(empty.ledger.counts.values()) and not any(empty.ledger.flops.values())


def test_the_terms_of_several_teachers_hold_the_text_once(run):
    loss = StepLoss(LossConfig(), 0.5, step_totals(run.data.train[:2], "token_mean"))
    alone = given(run, run.data.train[:2], loss).supervised()
    ((ce_coef, kd_coef, targets),) = alone.by_teacher()
    assert targets is None and ce_coef is alone.ce_coef and kd_coef is alone.kd_coef


def test_few_calls_lead_from_the_library_to_the_formula(tmp_path):
    package, most = str(Path(limbeck.__file__).parent), 0

    def profile(frame, event, _):
        nonlocal most
        if event == "call" and frame.f_code is forward_kl.__code__:
            calls, caller = 0, frame.f_back
            while caller is not None:
                calls += caller.f_code.co_filename.startswith(package)
                caller = caller.f_back
            most = max(most, calls)

    sys.setprofile(profile)
    try:
        limbeck.distill(
            "tiny-student",
            teacher="tiny-teacher",
            traces={"source": "builtin:chain", "num_traces": 4},
            num_validation=0,
            max_steps=1,
            out=tmp_path / "student",
        )
    finally:
        sys.setprofile(None)
    assert 0 < most <= MOST_CALLS
