"""The cut advisor: its parts against slow twins and hand-made traces, its refusals, and one advice as a whole."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_tokenizers import byte_tokenizer
from tiny_runs import run_config, save_model

import limbeck
from limbeck.config import build
from limbeck.errors import ConfigError, PairError, TraceFormatError
from limbeck.models.load import load_model, load_tokenizer
from limbeck.sweep.cut_facts import CutFacts, facts_of
from limbeck.sweep.free_run import is_copied
from limbeck.sweep.gain import PROVISIONAL, WEIGHTS, Start, predict
from limbeck.sweep.look import Look, compare, look
from limbeck.sweep.recommend import Considered, choose
from limbeck.sweep.seen import CutAdviceConfig
from limbeck.sweep.travel import steps_of, travel
from limbeck.teacher.live import LiveTeacher
from limbeck.traces.render import RenderConfig, render
from limbeck.traces.sample import Sample
from limbeck.traces.synthetic import generate
from limbeck.traces.trace import write_jsonl
from limbeck.traces.truncate import TruncationConfig

CHAIN = {"source": "builtin:chain", "num_traces": 12, "chain_min_steps": 1, "chain_max_steps": 3}


def sample_of(prompt: int, cot: int, answer: int) -> Sample:
    segments = np.repeat(np.arange(3, dtype=np.int8), [prompt, cot, answer])
    return Sample(
        input_ids=np.arange(len(segments), dtype=np.int32), segment_ids=segments, ending_start=prompt + cot - 1
    )


def look_of(samples, divergence) -> Look:
    owner = np.repeat(np.arange(len(samples)), [len(s) - 2 for s in samples])
    token = np.concatenate([np.arange(2, len(s)) for s in samples])
    place = np.concatenate([(np.arange(len(s) - 2) + 0.5) / (len(s) - 2) for s in samples])
    values = np.array([divergence(t) for t in token], dtype=np.float32)
    return Look(owner, token, place, values, values, values, values, values)


def test_a_comparison_is_that_of_the_definitions():
    rng = np.random.default_rng(4)
    student, teacher = rng.normal(size=(5, 30)) * 2, rng.normal(size=(5, 30)) * 2
    found = compare(torch.tensor(student), torch.tensor(teacher), torch.tensor([3, 7])).numpy()
    for row, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        q, p = np.exp(ours) / np.exp(ours).sum(), np.exp(theirs) / np.exp(theirs).sum()
        common = set(np.argsort(q)[-10:]) & set(np.argsort(p)[-10:])
        wanted = [(p * np.log(p / q)).sum(), -(q * np.log(q)).sum(), -(p * np.log(p)).sum()]
        assert found[row] == pytest.approx([*wanted, len(common) / 10, p[3] + p[7]], rel=1e-4)
    same = compare(torch.tensor(student), torch.tensor(student), torch.tensor([0]))
    assert float(same[:, 0].max()) == pytest.approx(0, abs=1e-6) and bool((same[:, 3] == 1).all())


def test_a_look_at_many_traces_is_that_at_each_alone(tmp_path):
    names = [save_model(tmp_path / f"{seed}", seed=seed, sharpness=20.0) for seed in (1, 2)]
    tokenizer, models = load_tokenizer(names[0]), [load_model(name, layout="packed") for name in names]
    samples = [render(trace, tokenizer, RenderConfig()) for trace in generate(5, 1, 1, 3)]
    found, ledger = look(*(LiveTeacher(model, 55) for model in models), samples, [4], 55)
    assert ledger.flops["teacher"] > 0
    for number, sample in enumerate(samples):
        ids, own = torch.tensor(sample.input_ids.astype(np.int64)), found.owner == number
        with torch.no_grad():
            logits = [load_model(name)(ids[None]).logits[0, :, :55] for name in names]
        rows = torch.tensor(found.token[own] - 1)
        wanted = compare(*(values[rows] for values in logits), torch.tensor([4])).numpy()
        columns = [getattr(found, name)[own] for name in Look._fields[3:]]
        np.testing.assert_allclose(np.stack(columns, 1), wanted, atol=2e-5)
        assert list(found.token[own]) == list(np.flatnonzero(sample.segment_ids > 0))
        assert found.place[own].min() > 0 and found.place[own].max() < 1


def test_binned_profile_has_the_means():
    seen = look_of([sample_of(2, 6, 2)], lambda token: float(token))
    assert seen.binned(4)["divergence"] == [2.5, 4.5, 6.5, 8.5]
    assert seen.binned(16)["overlap"].count(None) == 8


def test_whole_traces_keep_everything():
    samples = [sample_of(2, n, 2) for n in (4, 9, 30)]
    facts = facts_of(samples, look_of(samples, lambda token: 1.0), [4, None, 20], TruncationConfig())
    assert facts == CutFacts(1.0, 1.0, 1.0, 1.0, 0.0)


def test_a_share_hides_ends_that_a_common_length_shows():
    samples = [sample_of(2, n, 2) for n in (4, 6, 10, 40)]
    seen = look_of(samples, lambda token: 1.0)
    share = facts_of(samples, seen, [4, 4, 9, 30], TruncationConfig(lead_fraction=0.5))
    common = facts_of(samples, seen, [4, 4, 9, 30], TruncationConfig(policy="budget", budget_tokens=16))
    assert share.ends == 0 and share.censored == 0.75
    assert common.ends == 0.75 and common.censored == 0
    assert share.derivations == 0.5 and common.derivations == 0.75


def test_of_equal_lengths_both_cuts_are_the_same():
    samples = [sample_of(2, 16, 2)] * 3
    seen = look_of(samples, lambda token: float(token < 9))
    share = facts_of(samples, seen, [8, 8, 8], TruncationConfig(lead_fraction=0.5))
    common = facts_of(samples, seen, [8, 8, 8], TruncationConfig(policy="budget", budget_tokens=10))
    assert share == common == CutFacts(0.5, 1.0, 1.0, 0.0, 0.0)


SHARES = st.floats(0, 1)
FACTS = st.builds(CutFacts, tokens=SHARES, divergence=SHARES, derivations=SHARES, ends=SHARES, censored=SHARES)
STARTS = st.builds(Start, travel=st.floats(0, 5), ends_well=SHARES, right=SHARES)


@given(FACTS, STARTS, st.sampled_from(["divergence", "derivations", "ends"]), SHARES)
def test_who_keeps_less_is_predicted_to_gain_no_more(facts, start, name, share):
    less = facts._replace(**{name: getattr(facts, name) * share})
    assert predict(less, start).value <= predict(facts, start).value + 1e-9
    assert predict(facts, start).low <= predict(facts, start).value <= predict(facts, start).high


@given(FACTS, STARTS)
def test_faster_rates_are_predicted_to_keep_no_more(facts, start):
    faster = start._replace(travel=start.travel * 2)
    assert predict(facts, faster).value <= predict(facts, start).value + 1e-9


@given(STARTS)
def test_not_cutting_keeps_all(start):
    assert predict(CutFacts(1.0, 1.0, 1.0, 1.0, 0.0), start).value == 1
    assert all(weight >= 0 for weight in WEIGHTS.values())


def test_the_smallest_good_cut_is_chosen_and_none_where_none_is_good():
    def cut(policy, fraction, value):
        gain = predict(CutFacts(1.0, 1.0, 1.0, 1.0, 0.0), Start(0, 1, 0))._replace(value=value)
        return Considered(policy, fraction, None, CutFacts(0.5, 1.0, 1.0, 0.0, 0.0), fraction, gain)

    cuts = [cut("lead", 0.25, 0.2), cut("lead", 0.5, 0.9), cut("common_length", 0.5, 0.95), cut("lead", 0.75, 1.0)]
    assert choose(cuts) == cuts[2]
    assert choose(cuts[:1]) is None


@pytest.mark.parametrize(
    ("output", "answer", "copied"),
    [
        ("a 3+4=7\nSo 7\n</think>\n\n7", "7", True),
        ("a 3+4=7\nSo 7\n</think>\n\n8", "8", False),
        ("So 7", None, False),
        ("7", "7", False),
    ],
)
def test_an_answer_is_copied_when_the_thought_derives_it(output, answer, copied):
    assert is_copied(output, answer, RenderConfig(derivation_pattern="So {answer}")) is copied


def test_travel_is_the_sum_of_rates_over_the_size_of_the_weights(tmp_path):
    name = save_model(tmp_path / "model")
    model = load_model(name)
    changes = {"student.model": name, "optimizer.learning_rate": 1e-3, "schedule.name": "constant"}
    config = run_config({**changes, "schedule.warmup_fraction": 0.0})
    weights = torch.cat([m.weight.flatten() for n, m in model.named_modules() if n.endswith("_proj")])
    assert travel(model, config, 50) == pytest.approx(0.05 / weights.square().mean().sqrt().item(), rel=1e-5)
    assert travel(model, run_config({**changes, "optimizer.name": "sgd"}), 50) is None
    assert travel(model, run_config({**changes, "lora.rank": 4}), 50) is None


def test_steps_are_those_of_the_run():
    training = run_config().training
    assert steps_of(training, 100, 30.0) == 4
    assert steps_of(replace(training, max_steps=None, epochs=2.0), 100, 30.0) == 67
    assert steps_of(replace(training, max_steps=None, batch_size=None, batch_tokens=300), 100, 30.0) == 10
    assert steps_of(replace(training, max_steps=None, max_tokens=900), 100, 30.0) == 10


def advice_of(tmp_path, **fields):
    fields = {"traces": CHAIN, "derivation_pattern": "So {answer}", "most_traces": 6, "most_prompts": 3, **fields}
    return limbeck.advise_cut(student="tiny-student", teacher="tiny-teacher", out=tmp_path / "advice", **fields)


def test_an_advice_says_what_it_recommends_and_what_it_cost(tmp_path):
    made = advice_of(tmp_path, learning_rate=3e-4)
    advice = json.loads((made.path / "advice.json").read_text())
    assert (made.path / "advice.png").read_bytes().startswith(b"\x89PNG")
    found = advice["recommendation"]
    assert made.metrics["cut"] is found["cut"] and advice["sentence"].startswith("Cut at" if found["cut"] else "Do not")
    assert found["gain_kept_low"] <= found["gain_kept"] <= found["gain_kept_high"]
    assert {(cut["policy"], cut["lead_fraction"]) for cut in advice["cuts"]} == {
        (policy, share) for policy in ("common_length", "lead") for share in (0.25, 0.35, 0.5, 0.6, 0.75)
    }
    assert all(0 < cut["flops"] < 1 for cut in advice["cuts"])
    assert advice["cost"]["flops"] > 0 and advice["free"]["texts"] == 3 and not advice["not_seen"]
    assert all(0 < place < 1 for place in advice["derivations"]["places"])
    assert {len(values) for values in advice["profile"].values()} == {40}
    assert PROVISIONAL in advice["warnings"] and made.metrics["of_an_epoch"] == advice["cost"]["of_an_epoch"]


def test_what_cannot_be_looked_at_is_said(tmp_path):
    unknown = [replace(trace, reference=None, answer="p") for trace in generate(4, 3, 1, 2)]
    write_jsonl(unknown, tmp_path / "traces.jsonl")
    made = advice_of(tmp_path, traces=str(tmp_path / "traces.jsonl"), optimizer={"name": "sgd"})
    said = json.loads((made.path / "advice.json").read_text())["not_seen"]
    assert ["right" in said[0], "derivations" in said[1], "learning rate" in said[2]] == [True] * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"traces": {**CHAIN, "num_traces": 1}}, "1 of 1 traces have a response"),
        ({"most_traces": 1}, "most_traces must be at least 2"),
        ({"fractions": [0.5, 1.0]}, "shares between 0 and 1"),
    ],
)
def test_refused_before_any_model_is_run(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        advice_of(tmp_path, **fields)
    assert not (tmp_path / "advice").exists()


def test_traces_without_a_response_are_refused(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n} a+1", "answer": "2"}) + "\n" for n in range(4)))
    with pytest.raises(TraceFormatError, match="no reply"):
        advice_of(tmp_path, traces={"source": str(file), "format": "prompts"})


def test_models_with_other_tokens_are_refused(tmp_path):
    other = save_model(tmp_path / "other", vocab_size=300)
    byte_tokenizer().save_pretrained(other)
    with pytest.raises(PairError, match="tokenizer differs"):
        limbeck.advise_cut(student="tiny-student", teacher=other, traces=CHAIN, out=tmp_path / "advice")


@pytest.mark.parametrize("missing", ["teacher", "student"])
def test_both_models_are_needed(missing):
    tree = {"student": {"model": "tiny-student"}, "teacher": {"model": "tiny-teacher"}, "traces": CHAIN}
    tree[missing] = {} if missing == "teacher" else {"scratch": run_config().student.scratch}
    with pytest.raises(ConfigError, match=f"distill.{missing}.model"):
        build(CutAdviceConfig, {"distill": tree})
