"""Cut and complete: the teacher's beginning stays to the token, what is written is checked, its cost goes along."""

from __future__ import annotations

import pytest
from tiny_runs import run_config

from limbeck.checkpoint import Checkpoint
from limbeck.config import build
from limbeck.cost.hardware import Hardware
from limbeck.distill import train
from limbeck.distill.data import prepare
from limbeck.distill.predict import predict_distill
from limbeck.errors import ConfigError
from limbeck.evaluate import cut_and_complete
from limbeck.evaluate.cut_and_complete import CompleteConfig, cut_traces, predict_complete
from limbeck.models.load import load_tokenizer
from limbeck.stage import How
from limbeck.traces.render import render
from limbeck.traces.sources import TraceConfig, read_traces

TREE = {
    "student": "tiny-teacher",
    "traces": {"source": "builtin:chain", "num_traces": 12, "chain_min_steps": 2, "chain_max_steps": 4, "seed": 3},
    "truncation": {"policy": "common_length", "lead_fraction": 0.6},
    "sampling": {"max_new_tokens": 200},
    "checker": "exact",
    "group_traces": 5,
}


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    out = tmp_path_factory.mktemp("completed") / "out"
    cut_and_complete.run(build(CompleteConfig, TREE), out)
    return out


def read(out):
    return read_traces(build(TraceConfig, {"source": str(out)}))[0]


def test_beginnings_are_the_teachers_and_ends_are_right(completed):
    config, tokenizer = build(CompleteConfig, TREE), load_tokenizer("tiny-teacher")
    cuts, traces = cut_traces(config, tokenizer), read(completed)
    counts = Checkpoint(completed).metrics
    assert len(traces) == len(cuts) == counts["traces"] == 12
    assert 0 < counts["right"] <= counts["cut"]
    right = 0
    for cut, trace in zip(cuts, traces, strict=True):
        ids = render(trace, tokenizer, config.render).input_ids
        assert ids[: cut.kept].tolist() == cut.sample.input_ids[: cut.kept].tolist()
        if trace.metadata.get("completed_from_tokens") is not None:
            right += 1
            assert trace.correct and trace.answer == trace.reference and trace.cot_closed
        elif cut.is_open:
            assert len(ids) == cut.kept and not trace.cot_closed and trace.answer is None
        else:
            assert trace.cot == cut.trace.cot
    assert right == counts["right"]


def test_what_is_interrupted_goes_on_to_the_same_traces(completed, tmp_path, monkeypatch):
    config, out = build(CompleteConfig, TREE), tmp_path / "out"
    written, calls = cut_and_complete.complete, []

    def fail_at_second(*arguments, **fields):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return written(*arguments, **fields)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cut_and_complete, "complete", fail_at_second)
        cut_and_complete.run(config, out)
    cut_and_complete.run(config, out, how=How(resume=True))
    assert (out / "traces.jsonl").read_bytes() == (completed / "traces.jsonl").read_bytes()
    costs = [Checkpoint(directory).cost for directory in (out, completed)]
    assert costs[0]["flops"] == costs[1]["flops"] and costs[0]["rollout_tokens"] == costs[1]["rollout_tokens"]


def test_a_run_on_completed_traces_has_their_cost_and_a_dry_run_knows_it(completed, tmp_path):
    config = run_config({"traces": {"source": str(completed)}})
    cost = Checkpoint(completed).cost
    ledger = train.run(config, tmp_path / "run").cost
    assert ledger["flops"]["sampling"] == cost["flops"]["sampling"] > 0
    assert ledger["rollout_tokens"] == cost["rollout_tokens"]
    predicted = predict_distill(config, hardware=Hardware("here", {"float32": 5e10}, 1e10, 8e9))
    assert predicted.flops == {name: ledger["flops"][name] for name in predicted.flops}
    assert {len(e.sample) for e in prepare(config, load_tokenizer("tiny-teacher")).train}


def test_the_cost_is_predicted_from_what_is_cut_away(completed):
    predicted = predict_complete(build(CompleteConfig, TREE), hardware=Hardware("here", {"float32": 5e10}, 1e10, 8e9))
    assert predicted.flops["sampling"] == pytest.approx(Checkpoint(completed).cost["flops"]["sampling"], rel=0.5)


def test_failed_traces_can_go(tmp_path):
    # A student that knows nothing completes nothing.
    tree = {**TREE, "student": "tiny-student", "sampling": {"max_new_tokens": 3}, "failed": "drop"}
    with pytest.raises(ConfigError, match="no completion of 12 traces is right"):
        cut_and_complete.run(build(CompleteConfig, tree), tmp_path / "out")


@pytest.mark.parametrize(
    "cut", [{"keep_ending": True}, {"mask_only": True}, {"policy": "tail"}, {"policy": "random_span"}]
)
def test_cuts_that_keep_more_than_a_beginning_are_refused(cut):
    with pytest.raises(ConfigError, match="beginning"):
        build(CompleteConfig, {**TREE, "truncation": cut})
