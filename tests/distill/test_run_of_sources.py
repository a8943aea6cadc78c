"""Several sources in one run: amounts, weights, teachers, what is forgotten; planned, and resumed to the bit."""

from __future__ import annotations

import pytest
from tiny_runs import assert_same_bits, metrics_of, pull_plug, run_config, save_model

from limbeck.config import build, to_dict
from limbeck.cost.hardware import Hardware
from limbeck.distill import caching, train
from limbeck.distill.caching import CacheStageConfig
from limbeck.distill.config import DistillConfig
from limbeck.distill.data import prepare
from limbeck.distill.predict import predict_distill
from limbeck.errors import ConfigError
from limbeck.evaluate.seen import count_seen
from limbeck.evaluate.tasks import Problem
from limbeck.models.tiny import symbol_tokenizer
from limbeck.stage import How
from limbeck.traces.sources import TraceConfig, read_traces

CHAIN = {"source": "builtin:chain", "chain_min_steps": 1, "chain_max_steps": 3}
OLD = {"source": "builtin:chain", "num_traces": 9, "chain_min_steps": 3, "chain_max_steps": 4, "seed": 8}
REPLAY = [{"traces": OLD, "share": 0.25, "weight": 2.0}]
HARDWARE = Hardware("test", {"float32": 1e11}, 1e10, 2**34, 0.5)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    place = tmp_path_factory.mktemp("teachers")
    return [save_model(place / name, sharpness=30.0, seed=seed) for name, seed in (("one", 7), ("two", 8))]


def config(**changes):
    return run_config({"sources": REPLAY, "num_validation": 2, **changes})


def test_a_replay_is_planned_resumed_and_told(tmp_path, monkeypatch, teachers):
    own = [{**REPLAY[0], "teacher": {"model": teachers[1]}}]
    run = config(sources=own, **{"teacher.model": teachers[0], "training.save_every_steps": 1})
    whole = train.run(run, tmp_path / "whole")
    predicted = predict_distill(run, hardware=HARDWARE)
    assert sum(predicted.flops.values()) == whole.cost["flops"]["total"] and predicted.tokens == whole.cost["tokens"]

    pull_plug(monkeypatch, run, tmp_path / "out", 2)
    resumed = train.run(run, tmp_path / "out", how=How(resume=True))
    assert_same_bits(tmp_path / "out", tmp_path / "whole")
    assert resumed.metrics == whole.metrics

    new, old = whole.metrics["sources"]
    assert (new["source"], old["source"]) == ("builtin:chain", "builtin:chain [2]")
    assert new["tokens"] + old["tokens"] == whole.cost["tokens"]
    assert new["sequences"] + old["sequences"] == whole.cost["sequences"]
    last = metrics_of(tmp_path / "whole")[-1]["validation_ce_of"]
    assert [row["ce_after"] for row in (new, old)] == list(last.values())
    for row in (new, old):
        assert row["forgotten"] == max(0.0, row["ce_after"] - row["ce_before"])
    alone = run_config({"traces": OLD, "num_validation": 2, "teacher.model": teachers[0]})
    assert train.measure(alone, str(tmp_path / "whole"))["validation_ce"] == pytest.approx(old["ce_after"], rel=1e-5)


def test_a_share_of_the_tokens_is_replayed(tmp_path):
    run = config(**{"training.max_steps": None, "training.epochs": 6.0})
    new, old = train.run(run, tmp_path / "out").metrics["sources"]
    assert old["tokens"] / (new["tokens"] + old["tokens"]) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("stored", [False, True])
def test_every_source_is_taught_by_its_own(tmp_path, teachers, stored):
    """The KD term of a step over both is the mean of both, each from a run of its own."""
    one_batch = {"num_validation": 0, "training.max_steps": 1, "training.batch_size": 40, "loss.kd_ratio": 1.0}

    def teacher(number, traces):
        if not stored:
            return {"model": teachers[number]}
        place = tmp_path / f"cache{number}"
        tree = {"teacher": teachers[number], "traces": traces, "cache": {"mode": "hidden"}}
        caching.run(build(CacheStageConfig, tree), place)
        return {"cache": str(place)}

    given = [{**CHAIN, "num_traces": 12}, OLD]
    named = [teacher(number, traces) for number, traces in enumerate(given)]
    terms, counts = [], []
    for number, (traces, own) in enumerate(zip(given, named, strict=True)):
        run = run_config({"traces": traces, "teacher": own, **one_batch})
        out = train.run(run, tmp_path / f"alone{number}")
        terms.append(metrics_of(out.path)[0]["kd_term"])
        counts.append(out.cost["supervised_tokens"])
    both = run_config({"teacher": named[0], "sources": [{"traces": OLD, "teacher": named[1]}], **one_batch})
    found = metrics_of(train.run(both, tmp_path / "both").path)[0]["kd_term"]
    expected = sum(term * count for term, count in zip(terms, counts, strict=True)) / sum(counts)
    assert found == pytest.approx(expected, rel=1e-5)
    assert terms[0] != pytest.approx(terms[1], rel=1e-3)


def test_one_file_is_split_by_a_column(tmp_path):
    records = [
        f'{{"prompt": "{n}+1=", "completion": "<think>{n}+1</think>{n + 1}", "domain": "{"ab"[n % 2]}"}}'
        for n in range(8)
    ]
    (tmp_path / "both.jsonl").write_text("\n".join(records), encoding="utf-8")
    traces = {"source": str(tmp_path / "both.jsonl")}
    parts = [{"traces": traces, "select": {"where": {"domain": "b"}}, "epochs": 2.0}]
    run = run_config({"traces": traces, "select.where": {"domain": "a"}, "sources": parts, "num_validation": 1})
    data = prepare(run, symbol_tokenizer())
    assert [name.rpartition(" (")[2] for name in data.sources] == ["domain a)", "domain b)"]
    assert data.counts["train_traces"] == 6 and data.counts["validation_traces"] == 2
    assert [own["selected"]["kept"] for own in data.counts["sources"].values()] == [4, 4]


def test_what_one_source_holds_out_no_other_trains():
    again = [{"traces": {**CHAIN, "num_traces": 12}, "select": {"min_cot_chars": 9}}]
    run = config(sources=again, num_validation=3)
    data = prepare(run, symbol_tokenizer())
    held_out = {example.sample.trace_key for example in data.validation}
    assert held_out and not held_out & {example.sample.trace_key for example in data.train}


def test_all_sources_count_as_seen(tmp_path):
    out = train.run(config(**{"training.max_steps": 1}), tmp_path / "out").path
    traces, _ = read_traces(build(TraceConfig, OLD))
    problems = [Problem(messages=t.messages, reference=t.reference, key=t.prompt_key, metadata={}) for t in traces]
    assert count_seen(str(out), problems) == len(problems)


REFUSED = {
    "leave nothing": {"sources": [{"traces": OLD, "share": 0.6}] * 2},
    "leave epochs out": {"sources": [{"traces": OLD, "share": 0.6, "epochs": 2.0}]},
    "need one for traces too": {"sources": [{"traces": OLD, "teacher": {"model": "tiny-teacher"}}]},
    "no source weighs": {"sources": REPLAY, "teacher.model": "tiny-teacher", "on_policy": {"start_fraction": 0.5}},
    "shard_head": {"sources": REPLAY, "training.parallel": {"strategy": "shard", "shard_head": True}},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_is_refused(reason):
    with pytest.raises(ConfigError, match=reason):
        run_config(REFUSED[reason])


def test_a_recipe_is_what_its_manifest_says():
    run = config()
    assert build(DistillConfig, to_dict(run)) == run
